// The operations, one declaration a piece. cpu:: runs on the caller's thread and is finished on return; cuda:: enqueues
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

// The instruction sets that hashing can use on this machine, the fastest first, which is used unless another is chosen.
std::vector<std::string> simd_variants();
void use_simd(const std::string& name);

// Throws std::invalid_argument, with nothing written, if an id is outside [0, 2^32).
void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items);

// Throws std::invalid_argument for cuts that do not ascend strictly or exceed `count`.
void check_cuts(const std::vector<u64>& cuts, u64 count);

// keys: [cuts.size()][32] bytes. `cuts` have passed check_cuts. Throws std::invalid_argument, with nothing written, if
// an id before the last cut is outside [0, 2^32).
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys);

// The prefix keys of a prompt that grows, without starting over: what it keeps is the last leaf's content ids and one
// chaining value for each level of the tree. One thread at a time.
class RunningKeys {
 public:
  RunningKeys(const ItemTable& items, const u8 root[32]);

  u64 tokens() const { return tokens_; }

  // Appends tokens; keys: [cuts.size()][32] bytes, as prefix_keys gives for the whole prompt. `cuts` ascend strictly,
  // from the number of tokens before the call to that after it. Throws std::invalid_argument, with nothing appended and
  // nothing written, for other cuts or if an id is outside [0, 2^32).
  void extend(TokenIds token_ids, const std::vector<u64>& cuts, u8* keys);

 private:
  void put_key(u64 cut, const u64* leaf, const u32* leaf_cv, u8* key) const;
  void push_leaf(const u32* cv);

  ItemTable items_;
  u32 root_[blake3::kKeyWords];
  u64 tokens_ = 0;
  u64 leaves_ = 0;                       // in subtrees_, all but the last
  std::vector<ChainingValue> subtrees_;  // of complete subtrees, the largest first
  u64 last_[kLeafIds];                   // the content ids behind them: 1 to 128 once there are tokens
};

// Throws std::invalid_argument for a host id that is outside the cache and not -1, which stands for a page or slot that
// is not there.
void check_ids(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks);

// Both check_ids before anything is written, and use up to `threads` threads, as many as the bytes are worth.
// checksums: one of each chunk's payload, or null. Those of the parts of a payload add up to the whole one's.
void gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads);
void scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads);

// As gather and scatter of whole pages of 2-byte numbers, with payloads coded by tile_codec.h. Chunk::payload: where
// the coded tiles of the call's planes are, behind the payload's header, a multiple of 16; Chunk::offset: of the raw
// payload, a multiple of its planes' bytes. page_bytes: a multiple of 16, or there is one page and one plane; even.
// sums: of each chunk kCodedSums, the checksums of its raw payload and, of a gather, of its coded tiles, and 1 if one
// of them has more exceptions than fit: then the payload is garbage.
constexpr u64 kCodedSums = 3;
void gather_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads);
void scatter_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads);

u64 checksum(const u8* payload, u64 bytes);

// The share that bytes [offset, offset + bytes) of a payload have in its checksum, the bytes being at `part` and the
// offset a multiple of 16. The shares of all its parts add up to the checksum.
u64 checksum_part(const u8* part, u64 bytes, u64 offset, u64 payload_bytes);

// Copies bytes that are contiguous on both sides, as gather does; returns their checksum.
u64 copy(u8* to, const u8* from, u64 bytes, u32 threads);

}  // namespace cpu

namespace cuda {

// Where and how a call runs. Calls throw std::runtime_error when CUDA reports an error, and restore the current device.
// A CUDA graph can capture them, save where place_table is needed: then they throw.
struct Launch {
  int device;
  void* stream;  // cudaStream_t
  // Of a copy: caps the grid (0: as many blocks as fill the device), to leave SMs to other work.
  u32 max_blocks = 0;
  // Of a copy in page mode: payloads are mapped host memory, by their device addresses.
  bool payloads_on_host = false;
  // Copies a table that is too long for kernel parameters (some 3.8 KiB) to where a kernel that the stream is given
  // next can read it; returns the address for that kernel.
  std::function<const u8*(const u8* table, u64 bytes)> place_table = {};
  // Of a copy, if set: gives device-accessible memory for so many u64s, which become PartialSums::add_up's, and no
  // `checksums` are made.
  std::function<u64*(u64 count)> partial_sums = {};
};

// As cpu::, except that nothing is validated: an id outside [0, 2^32) is left as it is.
void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items, const Launch& launch);

// As cpu::, except that nothing is validated: from the first cut behind an id outside [0, 2^32) on, keys are zeros.
// `cuts` is host memory, token_ids and keys are device memory. `workspace`: device memory of so many bytes, 256-byte
// aligned, left alone until the stream has passed the call.
u64 prefix_keys_workspace_bytes(u64 count, u64 num_cuts);
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys,
                 void* workspace, const Launch& launch);

// The checksums of a copy's payloads before their last additions, which are the host's: no small copy has to queue
// behind payloads, and nothing has to be zeroed. The n-th chunk's are ranges[n].
struct PartialSums {
  struct Range {
    u64 begin, end;
    u64 length_term;
  };
  std::vector<Range> ranges;

  // sums: what Launch::partial_sums gave, once the copy is finished.
  std::vector<u64> add_up(const u64* sums) const {
    std::vector<u64> checksums;
    for (const Range& range : ranges)
      checksums.push_back(std::accumulate(sums + range.begin, sums + range.end, range.length_term));
    return checksums;
  }
};

// As cpu::, except that ids outside the cache count as not there. The planes, payloads and checksums are device memory.
// Chunk::ids are device memory too, or all of them host memory (copied before return) where `host_ids`. A gather
// without payloads (null, all of them) makes checksums only. A call with many chunks may be several kernels.
PartialSums gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                   const Launch& launch);
PartialSums scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                    const Launch& launch);

// Loads the kernels of page mode on the current device, which CUDA otherwise does when they are first launched.
void load_page_copies(const char* op);

// Pins host memory for transfers of all devices, in pieces, none of which is longer than `piece_bytes`: drivers refuse
// very long ones, and a transfer must not cross the end of one. Throws std::runtime_error, with nothing pinned, if a
// piece cannot be. Unregister what was registered before it is unmapped, and when no transfer uses it.
void register_host(int device, void* address, u64 bytes, u64 piece_bytes);
void unregister_host(int device, void* address, u64 bytes, u64 piece_bytes);

// What a stream holds at a moment. Throws std::runtime_error for a stream that is being captured.
class Event {
 public:
  Event(int device, void* stream);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

 private:
  friend class Staging;
  int device_;
  void* event_;
};

// Copies of chunks between a GPU's pages and pinned host memory, through a ring of buffers in device memory: kernels
// gather (or scatter) one buffer while the copy engine empties (or fills) another. Or without the ring, where the
// caller says so. On streams of its own, ordered by events; nothing waits for the device but what says so. One object
// for each direction, so that both are under way at once; its jobs may be of several threads.
class Staging {
 public:
  // A transfer, begun layer by layer. Its destructor waits for what is under way. `order` may be called by any thread,
  // the others by one at a time, and go_on while the Staging lives.
  class Job {
   public:
    ~Job();
    // Begins what has not been begun of the layers within the first `planes` planes, behind what `behind` (or nullptr)
    // stands for. Of a store, a step of several layers begins with the last of them. After an exception nothing is
    // under way, and the job is over.
    void go_on(u64 planes, const Event* behind);
    // Returns when the last access to the first `planes` planes has been begun, or the job is over. What `stream` is
    // given from now on comes behind that access.
    void order(void* stream, u64 planes) const;
    // Waits for what was begun; the job is over. The payloads' checksums, if they were asked for. Throws
    // std::runtime_error if not all was begun.
    std::vector<i64> wait();

   private:
    friend class Staging;
    struct State;
    explicit Job(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
  };

  // ring: device memory of `buffers` (at least 2) times buffer_bytes (a multiple of 256), the object's for as long as
  // it lives. urgent: the device prefers its work to others' (loads), else others' to its. max_blocks: of a kernel's
  // grid; 0: as many as keep up with the bus.
  Staging(int device, u8* ring, u64 buffer_bytes, u32 buffers, bool urgent, u32 max_blocks);
  ~Staging();

  // Page mode, ids outside the cache count as not there. Chunk::ids: host memory, copied before return; Chunk::payload:
  // pinned host memory, which is the job's until it is finished; Chunk::offset: 0. ends: up to which plane each layer
  // reaches, the last of them the last plane. A load begins with the first layer. Chunks of whole pages whose runs,
  // contiguous in cache and payload, are at least fragment_bytes long on average (0: none) are copied without the ring.
  // kernel_blocks > 0: a kernel of so many blocks reads or writes the host's memory instead. With payloads in memory
  // that is not pinned all goes through the ring, slowly. Throws std::invalid_argument for a chunk of which one
  // layer does not fit into a buffer, and for checksums of layers that end within 16 bytes of a payload.
  std::unique_ptr<Job> store(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends, bool checksums,
                             u64 fragment_bytes, u32 kernel_blocks);
  std::unique_ptr<Job> load(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends, bool checksums,
                            const Event& behind, u64 fragment_bytes, u32 kernel_blocks);

 private:
  struct State;
  std::unique_ptr<Job> begin(std::unique_ptr<Job::State> state, u64 fragment_bytes);
  std::shared_ptr<State> state_;
};

// How many GPUs there are; 0, with `why` set, when there is no driver or it is too old for this build.
int device_count(std::string& why);

}  // namespace cuda
}  // namespace lmc
