// The operations, one declaration each. cpu:: runs on the caller's thread and is finished on return; cuda:: enqueues
// on a stream and never waits for the device.
#pragma once

#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "checksum.h"
#include "content_ids.h"
#include "copy_span.h"
#include "tile_codec.h"

namespace lmc {

struct TokenIds {
  const void* data;
  u64 count;
  bool wide;  // int64, else int32

  LMC_HOST_DEVICE i64 operator[](u64 i) const {
    return wide ? static_cast<const i64*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  }
};

namespace cpu {

constexpr u64 kLeafIds = blake3::kLeafBytes / 8;
using ChainingValue = std::array<u32, blake3::kKeyWords>;

// The instruction sets that this machine can run, the fastest first; that one is used unless another is chosen.
std::vector<std::string> simd_variants();
void use_simd(const std::string& name);

// Throws std::invalid_argument, with nothing written, if an id is outside [0, 2^32).
void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items);

// Throws std::invalid_argument for cuts that do not ascend strictly or exceed `count`.
void check_cuts(const std::vector<u64>& cuts, u64 count);

// keys: [cuts.size()][32] bytes. `cuts` have passed check_cuts. Throws std::invalid_argument, with nothing written, if
// an id before the last cut is outside [0, 2^32).
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys);

// The prefix keys of a growing prompt, without starting over: it keeps the last leaf's content ids and one chaining
// value per level of the tree. One thread at a time.
class RunningKeys {
 public:
  RunningKeys(const ItemTable& items, const u8 root[32]);

  u64 tokens() const { return tokens_; }

  // Appends tokens; keys: [cuts.size()][32] bytes, as prefix_keys returns them for the whole prompt. `cuts` ascend
  // strictly, between the number of tokens before the call and the number after it. Throws std::invalid_argument, with
  // nothing appended and nothing written, for other cuts or if an id is outside [0, 2^32).
  void extend(TokenIds token_ids, const std::vector<u64>& cuts, u8* keys);

 private:
  void put_key(u64 cut, const u64* leaf, const u32* leaf_cv, u8* key) const;
  void push_leaf(const u32* cv);

  ItemTable items_;
  u32 root_[blake3::kKeyWords];
  u64 tokens_ = 0;
  u64 leaves_ = 0;                       // in subtrees_, all but the last
  std::vector<ChainingValue> subtrees_;  // of complete subtrees, the largest first
  u64 last_[kLeafIds];                   // the content ids after them: 1 to 128 once there are tokens
};

// Throws std::invalid_argument for a host id that is outside the cache, except -1, which stands for a missing page or
// slot.
void check_ids(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks);

// Both call check_ids before writing anything, and use up to `threads` threads, fewer for few bytes.
// checksums: one per chunk, of its payload, or null. The checksums of a payload's parts add up to the payload's.
void gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads);
void scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads);

// Gather and scatter of whole pages of 2-byte numbers, with payloads coded by tile_codec.h. Chunk::payload: the address
// of the coded tiles of the call's planes, after the payload's header, a multiple of 16. Chunk::offset: in the raw
// payload, a multiple of its planes' bytes. page_bytes: even, and a multiple of 16 unless there is one page and one
// plane. sums: kCodedSums per chunk; for a scatter, only the first.
void gather_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads);
void scatter_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads);

u64 checksum(const u8* payload, u64 bytes);

// The share of bytes [offset, offset + bytes) of a payload in its checksum. The bytes are at `part`; `offset` is a
// multiple of 16. The shares of all parts add up to the checksum.
u64 checksum_part(const u8* part, u64 bytes, u64 offset, u64 payload_bytes);

// Copies contiguous bytes, as gather does. Returns their checksum.
u64 copy(u8* to, const u8* from, u64 bytes, u32 threads);

}  // namespace cpu

namespace cuda {

// Where and how a call runs. Calls throw std::runtime_error when CUDA reports an error, and restore the current device.
// A CUDA graph can capture them, except calls that need place_table: those throw.
struct Launch {
  int device;
  void* stream;  // cudaStream_t
  // For copies: the most blocks of the grid, to leave SMs to other work (0: as many blocks as fill the device).
  u32 max_blocks = 0;
  // For copies in page mode: payloads are mapped host memory, given by their device addresses.
  bool payloads_on_host = false;
  // Copies a table that is too long for kernel parameters (about 3.8 KiB) to memory that the stream's next kernel can
  // read; returns its address for that kernel.
  std::function<const u8*(const u8* table, u64 bytes)> place_table = {};
  // For copies, if set: returns device-accessible memory for `count` u64s. The copy writes PartialSums::add_up's input
  // there, and no `checksums`.
  std::function<u64*(u64 count)> partial_sums = {};
};

// As in cpu::, but without validation: an id outside [0, 2^32) is left as it is.
void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items, const Launch& launch);

// As in cpu::, but without validation: from the first cut after an id outside [0, 2^32) on, keys are zeros. `cuts` is
// in host memory; token_ids and keys are in device memory. `workspace`: device memory of prefix_keys_workspace_bytes,
// 256-byte aligned, not to be touched until the stream has passed the call.
u64 prefix_keys_workspace_bytes(u64 count, u64 num_cuts);
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys,
                 void* workspace, const Launch& launch);

// The checksums of a copy's payloads before the last additions. The host does those, so that no small copy has to queue
// behind payloads and nothing has to be zeroed. ranges[n] belongs to the n-th chunk.
struct PartialSums {
  struct Range {
    u64 begin, end;
    u64 length_term;
  };
  std::vector<Range> ranges;

  // sums: the memory that Launch::partial_sums returned, after the copy has finished.
  std::vector<u64> add_up(const u64* sums) const {
    std::vector<u64> checksums;
    for (const Range& range : ranges)
      checksums.push_back(std::accumulate(sums + range.begin, sums + range.end, range.length_term));
    return checksums;
  }
};

// As in cpu::, but ids outside the cache count as missing. The planes, payloads and checksums are in device memory.
// Chunk::ids are in device memory too or, if `host_ids`, all in host memory (copied before return). A gather whose
// payloads are all null only computes checksums. A call with many chunks may launch several kernels.
PartialSums gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                   const Launch& launch);
PartialSums scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                    const Launch& launch);

// As in cpu::, with pages, tokens and payloads of whole lanes of 16 bytes, else std::invalid_argument. Sums are made
// only as partial_sums: kCodedSums ranges per chunk for a gather, one for a scatter.
PartialSums gather_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, bool host_ids,
                         const Launch& launch);
PartialSums scatter_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, bool host_ids,
                          const Launch& launch);

// Loads the kernels of page mode on the current device now; otherwise CUDA loads them at their first launch.
void load_page_copies(const char* op);

// Pins host memory for transfers of all devices, in pieces of at most `piece_bytes`, because drivers refuse very long
// pieces. A transfer must not cross the end of a piece. Throws std::runtime_error, with nothing pinned, if a piece
// cannot be pinned. Unregister memory before it is unmapped, and when no transfer uses it.
void register_host(int device, void* address, u64 bytes, u64 piece_bytes);
void unregister_host(int device, void* address, u64 bytes, u64 piece_bytes);

// An event after the work that a stream holds now. Throws std::runtime_error for a stream that is being captured.
class Event {
 public:
  Event(int device, void* stream);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void wait() const;

 private:
  friend class Staging;
  int device_;
  void* event_;
};

// Copies of chunks between a GPU's pages and pinned host memory, through a ring of buffers in device memory: kernels
// gather (or scatter) one buffer while the copy engine empties (or fills) another. The caller can choose to bypass the
// ring. Copies run on their own streams, ordered by events; only functions that say so wait for the device. Use one
// object per direction, so that both directions can run at once. Several threads may use its jobs.
class Staging {
 public:
  // A transfer, started layer by layer. Its destructor waits for copies under way. Any thread may call `order`; only
  // one thread at a time may call the other functions, and go_on only while the Staging exists.
  class Job {
   public:
    ~Job();
    // Starts the layers within the first `planes` planes that have not started, ordered after `behind` if it is not
    // null. A store's step of several layers starts only with the last of them. After an exception nothing is under
    // way, and the job is over.
    void go_on(u64 planes, const Event* behind);
    // Returns when the last access to the first `planes` planes has been enqueued, or the job is over. Work that
    // `stream` is given after this call runs after that access.
    void order(void* stream, u64 planes) const;
    // Waits for the copies that have started, and ends the job. Returns the payloads' checksums, if they were
    // requested. Throws std::runtime_error if not all copies have started.
    std::vector<i64> wait();

   private:
    friend class Staging;
    struct State;
    explicit Job(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
  };

  // ring: device memory of `buffers` (at least 2) times buffer_bytes (a multiple of 256), which only this object uses
  // during its lifetime. urgent: its streams get the highest priority (for loads), else the lowest. max_blocks: of the
  // grid of a kernel without the codec; with it, three times as many. 0: as many as keep up with the bus.
  Staging(int device, u8* ring, u64 buffer_bytes, u32 buffers, bool urgent, u32 max_blocks);
  ~Staging();

  // Page mode; ids outside the cache count as missing. Chunk::ids: host memory, copied before return. Chunk::payload:
  // pinned host memory, which only the job may use until it has finished. Chunk::offset: 0. ends: the plane at which
  // each layer ends; the last layer ends at the last plane. `load` itself starts the first layer. Chunks of whole pages
  // whose runs, contiguous in cache and payload, are at least fragment_bytes long on average (0: none) bypass the ring.
  // kernel_blocks > 0: a kernel of so many blocks reads or writes the host's memory instead. If payloads are not in
  // pinned memory, everything goes through the ring, slowly. Throws std::invalid_argument for a chunk with a layer that
  // does not fit into a buffer, and for checksums of layers that do not end at multiples of 16 bytes of a payload.
  // coded: whether each chunk's payload is coded, as in gather_coded; empty: none is. A store that is given it returns
  // kCodedSums sums per chunk, of which only the first counts for a raw one.
  std::unique_ptr<Job> store(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends, bool checksums,
                             u64 fragment_bytes, u32 kernel_blocks, std::vector<bool> coded = {});
  std::unique_ptr<Job> load(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends, bool checksums,
                            const Event& behind, u64 fragment_bytes, u32 kernel_blocks, std::vector<bool> coded = {});

 private:
  struct State;
  std::unique_ptr<Job> begin(std::unique_ptr<Job::State> state, u64 fragment_bytes);
  std::shared_ptr<State> state_;
};

// The number of GPUs; 0, with `why` set, if there is no driver or it is too old for this build.
int device_count(std::string& why);

}  // namespace cuda
}  // namespace lmc
