// Transfers between the pages of a GPU and pinned host memory: staged through a ring of buffers in device memory,
// filled by kernels and emptied by the copy engine, or the other way round; by copies of long runs directly from or to
// pages; or by a few blocks of a kernel that read or write the host's memory.
//
// A job runs in steps, each with a buffer b of the ring. `>` marks an event that a stream waits for:
//   store  kernels:  [behind] > [free b] > gather into b, record filled b, record reached
//          copies:   [filled b] > one batch to payloads, record free b ... record finished
//   load   copies:   [free b] > one batch into b, record filled b
//          kernels:  [behind] > [filled b] > scatter from b, record free b, record reached ... record finished
// Long runs are copied in the same batch, without the buffer. Then a load's copies wait for [behind], and a store's
// copies record reached. Kernels write partial checksums to pinned memory; a separate launch computes those of long
// runs. A job by kernels alone needs no copies and no buffer. Chunks with coded payloads always go through the ring,
// where they have fewer bytes: kernels code them as they gather, and decode them as they scatter.
//
// A step is a range of planes of all chunks, or a range of chunks of one layer's planes. The first step is limited to
// one layer and kFirstStepBytes; the limit doubles with each step. So the first layer ends early, and the others take
// few calls.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

#include "batch_copy.h"
#include "error.h"
#include "ops.h"

#if __has_include(<nvtx3/nvToolsExtCudaRt.h>)
#include <nvtx3/nvToolsExtCudaRt.h>
#else
#define nvtxNameCudaStreamA(stream, name) static_cast<void>(name)
#define nvtxRangePushA(name) static_cast<void>(name)
#define nvtxRangePop() static_cast<void>(0)
#endif

namespace lmc::cuda {
namespace {

constexpr u64 kAlignment = 256, kFirstStepBytes = 1 << 20;
// Pinned memory that is allocated in advance, so that no transfer has to allocate it.
constexpr u64 kPinnedBytes = 32 << 10, kPinnedBlocks = 32;

u64 align(u64 bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// For destructors, which cannot report errors.
void quietly(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
}

// For destructors: if the guard fails, does the work without it.
template <typename Work>
void on_device(int device, const Work& work) {
  try {
    const DeviceGuard guard("transfer", device);
    return work();
  } catch (const std::exception&) {
  }
  work();
}

cudaEvent_t new_event(const char* op) {
  cudaEvent_t event = nullptr;
  LMC_CUDA_CHECK(op, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

void refuse_capture(const char* op, void* stream) {
  if (is_captured(op, stream))
    throw std::runtime_error(std::string(op) + ": the stream is being captured, and no CUDA graph can hold a transfer");
}

// Bytes in each plane that are contiguous both in the cache and in a chunk's payload.
struct Run {
  u64 in_plane, in_payload, bytes;
};

// The runs of a chunk of whole pages, none missing, if they are at least `least_bytes` long on average; else none.
std::vector<Run> long_runs(const PagedCache& cache, const Chunk& chunk, u64 least_bytes) {
  std::vector<Run> runs;
  if (least_bytes == 0 || cache.splits_pages(Mode::kPage, chunk)) return runs;
  for (u64 i = 0; i < chunk.count; ++i) {
    if (chunk.id(i) >= cache.num_pages) return {};
    for (u64 in_page = 0; in_page < cache.page_bytes; in_page += cache.run_bytes) {
      const u64 at = chunk.id(i) * cache.page_stride + in_page / cache.run_bytes * cache.run_stride;
      if (!runs.empty() && runs.back().in_plane + runs.back().bytes == at) {
        runs.back().bytes += cache.run_bytes;
      } else {
        if ((runs.size() + 1) * least_bytes > chunk.count * cache.page_bytes) return {};
        runs.push_back({at, i * cache.page_bytes + in_page, cache.run_bytes});
      }
    }
  }
  return runs;
}

// How many blocks of a kernel keep up with the bus; the other multiprocessors are left for compute. A bus has at most
// 128 GB/s (PCIe 6) or 450 GB/s (NVLink-C2C); a block has 16 KiB in flight, which take at most 2 us.
u32 blocks_for_bus(const char* op, int device) {
  int is_c2c = 0;
  LMC_CUDA_CHECK(op, cudaDeviceGetAttribute(&is_c2c, cudaDevAttrHostNativeAtomicSupported, device));
  return (is_c2c ? 450'000 : 128'000) * 2 / (16 << 10) + 1;
}

// A range that profilers show next to the streams' names; docs/design.md has a picture. Without a profiler it costs one
// test of a pointer.
struct Range {
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
};

// Kernels with the codec execute about twice as many instructions per raw byte, of which 1.29 become a byte on the bus:
// so many times as many blocks keep up with it.
constexpr u32 kCodedBlocks = 3;

// Planes [begin, end) of chunks [first, last).
struct Step {
  u64 begin, end;
  std::size_t first, last;
};

}  // namespace

Event::Event(int device, void* stream) : device_(device) {
  const char* op = "transfer";
  const DeviceGuard guard(op, device);
  refuse_capture(op, stream);
  event_ = new_event(op);
  const cudaError_t recorded = cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream));
  if (recorded != cudaSuccess) quietly(cudaEventDestroy(static_cast<cudaEvent_t>(event_)));
  LMC_CUDA_CHECK(op, recorded);
}

void Event::wait() const {
  const char* op = "transfer";
  const DeviceGuard guard(op, device_);
  LMC_CUDA_CHECK(op, cudaEventSynchronize(static_cast<cudaEvent_t>(event_)));
}

Event::~Event() {
  on_device(device_, [this] { quietly(cudaEventDestroy(static_cast<cudaEvent_t>(event_))); });
}

struct Staging::State {
  // Mapped pinned memory for tables and partial checksums, which jobs exchange with kernels. It is kept, because
  // allocating or freeing it may wait for the device.
  struct Pinned {
    u8* host;
    u64 bytes;
  };

  int device;
  u8* ring;
  u64 buffer_bytes;
  u32 buffers, max_blocks;
  cudaStream_t kernels = nullptr, copies = nullptr;
  std::vector<cudaEvent_t> filled{}, free{};  // by buffer
  std::mutex one_job{};                       // one job at a time enqueues
  u32 next = 0;
  std::mutex pinned_mutex{};
  std::vector<Pinned> pinned{};

  ~State() {
    on_device(device, [this] {
      for (const cudaEvent_t event : filled) quietly(cudaEventDestroy(event));
      for (const cudaEvent_t event : free) quietly(cudaEventDestroy(event));
      for (const Pinned& block : pinned) quietly(cudaFreeHost(block.host));
      if (kernels) quietly(cudaStreamDestroy(kernels));
      if (copies) quietly(cudaStreamDestroy(copies));
    });
  }

  void synchronize() {
    quietly(cudaStreamSynchronize(copies));
    quietly(cudaStreamSynchronize(kernels));
  }

  static Pinned allocate(const char* op, u64 bytes) {
    void* host = nullptr;
    LMC_CUDA_CHECK(op, cudaHostAlloc(&host, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    return {static_cast<u8*>(host), bytes};
  }
  Pinned take(const char* op, u64 bytes) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      for (Pinned& block : pinned)
        if (block.bytes >= bytes) {
          std::swap(block, pinned.back());
          const Pinned taken = pinned.back();
          pinned.pop_back();
          return taken;
        }
    }
    return allocate(op, std::max(bytes, kPinnedBytes));
  }
  void give_back(const std::vector<Pinned>& blocks) {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(pinned.end(), blocks.begin(), blocks.end());
  }
};

struct Staging::Job::State {
  struct Reached {
    u64 planes;  // the event comes after the last access to the first `planes` planes
    cudaEvent_t event;
  };
  struct Sums {
    std::vector<std::size_t> of;  // where they belong among the job's
    PartialSums partial;
    const u64* sums;
  };
  enum class Kind { kRaw, kRuns, kCoded };  // of a chunk: how its bytes go

  const char* op;
  bool is_store, checksums;
  std::shared_ptr<Staging::State> staging;
  PagedCache cache;
  std::vector<Chunk> chunks;
  std::vector<u64> ends;    // of layers, in planes
  u32 kernel_blocks;        // 0: kernels do not access payloads
  std::vector<bool> coded;  // by chunk; empty: none is
  std::vector<std::vector<i64>> ids{};
  std::vector<std::vector<Run>> runs{};  // by chunk; none: the chunk goes through the ring
  bool has_runs = false, is_pinned = true;

  // The position and size limit of the next step.
  u64 plane = 0;
  std::size_t chunk = 0;
  u64 budget = 0;

  std::vector<Staging::State::Pinned> pinned{};
  u64 pinned_used = 0;
  std::vector<Sums> sums{};
  cudaEvent_t finished = nullptr;
  bool under_way = false;

  // For threads that wait for planes.
  std::mutex mutex{};
  std::condition_variable changed{};
  std::vector<Reached> reached{};
  bool over = false;

  ~State() {
    on_device(staging->device, [this] {
      if (under_way) quietly(cudaEventSynchronize(finished));
      for (const Reached& one : reached) quietly(cudaEventDestroy(one.event));
      if (finished) quietly(cudaEventDestroy(finished));
    });
    staging->give_back(pinned);
  }

  void prepare(u64 fragment_bytes) {
    const DeviceGuard guard(op, staging->device);
    if (chunks.empty()) plane = ends.back();
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      Chunk& one = chunks[c];
      u64 from = 0;
      for (const u64 end : ends) {
        if (checksums && end != ends.back() && end * one.count * cache.page_bytes % kLaneBytes)
          throw std::invalid_argument(std::string(op) + ": chunk " + std::to_string(c) + ": layers do not end at " +
                                      "multiples of 16 bytes of its payload, as checksums need");
        if (bytes_of(c, from, end) > staging->buffer_bytes)
          throw std::invalid_argument(std::string(op) + ": chunk " + std::to_string(c) + " needs a buffer of " +
                                      std::to_string(bytes_of(c, from, end)) + " bytes, and those of the ring have " +
                                      std::to_string(staging->buffer_bytes));
        from = end;
      }
      ids.emplace_back();
      for (u64 i = 0; i < one.count; ++i) ids.back().push_back(static_cast<i64>(one.id(i)));
      one.ids = ids.back().data();
      one.wide = true;
      void* address = nullptr;  // for devices; only pinned memory has one
      if (is_pinned && cudaHostGetDevicePointer(&address, one.payload, 0) == cudaSuccess) {
        one.payload = static_cast<u8*>(address);
      } else {
        cudaGetLastError();
        is_pinned = false;
      }
    }
    if (!is_pinned || std::find(coded.begin(), coded.end(), true) != coded.end()) kernel_blocks = 0;
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      runs.push_back(long_runs(cache, chunks[c], kernel_blocks || is_coded(c) ? 0 : fragment_bytes));
      has_runs |= !runs.back().empty();
    }
    budget = std::min(kFirstStepBytes, staging->buffer_bytes);
    finished = new_event(op);
  }

  bool is_coded(std::size_t c) const { return !coded.empty() && coded[c]; }
  Kind kind(std::size_t c) const { return is_coded(c) ? Kind::kCoded : runs[c].empty() ? Kind::kRaw : Kind::kRuns; }
  u64 sums_per_chunk() const { return is_store && !coded.empty() ? kCodedSums : 1; }
  u64 raw_plane_bytes(std::size_t c) const { return chunks[c].count * cache.page_bytes; }
  // Of its payload.
  u64 plane_bytes(std::size_t c) const {
    return is_coded(c) ? coded_plane_bytes(raw_plane_bytes(c)) : raw_plane_bytes(c);
  }
  u64 bytes_of(std::size_t c, u64 begin, u64 end) const { return align((end - begin) * plane_bytes(c)); }

  // The next step, if it lies within the first `planes` planes.
  bool next_step(u64 planes, Step& step) {
    if (plane == ends.back()) return false;
    auto end = std::upper_bound(ends.begin(), ends.end(), plane);
    step = {plane, *end, chunk, chunk};
    u64 bytes = 0;
    while (step.last < chunks.size() && (step.last == chunk || bytes + bytes_of(step.last, plane, *end) <= budget))
      bytes += bytes_of(step.last++, plane, *end);
    const bool whole = step.last == chunks.size();
    if (whole && chunk == 0 && plane > 0)  // the first layer is not joined with others
      while (++end != ends.end()) {
        bytes = 0;
        for (std::size_t c = 0; c < chunks.size(); ++c) bytes += bytes_of(c, plane, *end);
        if (bytes > budget) break;
        step.end = *end;
      }
    if (step.end > planes) return false;
    chunk = whole ? 0 : step.last;
    if (whole) plane = step.end;
    budget = std::min(2 * budget, staging->buffer_bytes);
    return true;
  }

  u8* allocate(u64 bytes) {
    bytes = (bytes + 15) / 16 * 16;
    if (pinned.empty() || pinned_used + bytes > pinned.back().bytes) {
      pinned.push_back(staging->take(op, bytes));
      pinned_used = 0;
    }
    pinned_used += bytes;
    return pinned.back().host + pinned_used - bytes;
  }

  // Launches a kernel for the step's chunks of one kind; for long runs it only computes checksums.
  void run_kernel(const Step& step, Kind of_kind, u8* buffer) {
    const bool with_runs = of_kind == Kind::kRuns, is_coded = of_kind == Kind::kCoded;
    Sums made{{}, {}, nullptr};
    std::vector<Chunk> parts;
    u64 in_buffer = 0;
    for (std::size_t c = step.first; c < step.last; ++c) {
      if (kind(c) == of_kind) {
        Chunk part = chunks[c];
        part.offset = step.begin * raw_plane_bytes(c);
        part.payload = with_runs ? nullptr : kernel_blocks ? part.payload + part.offset : buffer + in_buffer;
        for (u64 n = 0; n < (is_coded ? sums_per_chunk() : 1); ++n) made.of.push_back(c * sums_per_chunk() + n);
        parts.push_back(part);
      }
      in_buffer += bytes_of(c, step.begin, step.end);
    }
    if (parts.empty() || (with_runs && !checksums)) return;
    PagedCache planes = cache;
    planes.planes.assign(cache.planes.begin() + static_cast<i64>(step.begin),
                         cache.planes.begin() + static_cast<i64>(step.end));
    const u32 ring_blocks = staging->max_blocks * (is_coded ? kCodedBlocks : 1);
    Launch where{staging->device, staging->kernels, kernel_blocks ? kernel_blocks : ring_blocks, kernel_blocks > 0};
    where.place_table = [this](const u8* table, u64 bytes) {
      return static_cast<const u8*>(std::memcpy(allocate(bytes), table, bytes));
    };
    if (checksums)
      where.partial_sums = [&](u64 count) {
        u64* sums_of_blocks = reinterpret_cast<u64*>(allocate(8 * count));
        made.sums = sums_of_blocks;
        return sums_of_blocks;
      };
    if (is_coded)
      made.partial = is_store ? gather_coded(planes, parts, true, where) : scatter_coded(planes, parts, true, where);
    else
      made.partial = is_store || with_runs ? gather(planes, Mode::kPage, parts, true, nullptr, where)
                                           : scatter(planes, Mode::kPage, parts, true, nullptr, where);
    if (checksums) sums.push_back(std::move(made));
  }

  void run_kernels(const Step& step, u8* buffer) {
    for (const Kind one : {Kind::kRaw, Kind::kRuns, Kind::kCoded}) run_kernel(step, one, buffer);
  }

  void copy(const Step& step, u8* buffer) {
    std::vector<Fragment> fragments;
    for (std::size_t c = step.first; c < step.last; ++c) {
      u8* payload = chunks[c].payload + step.begin * plane_bytes(c);
      if (runs[c].empty() && plane_bytes(c))
        fragments.push_back({buffer, payload, (step.end - step.begin) * plane_bytes(c)});
      buffer += bytes_of(c, step.begin, step.end);
      for (u64 p = step.begin; p < step.end; ++p, payload += plane_bytes(c))
        for (const Run& run : runs[c])
          fragments.push_back({cache.planes[p] + run.in_plane, payload + run.in_payload, run.bytes});
    }
    copy_fragments(op, fragments, is_store, is_pinned, staging->copies);
  }

  // The stream that ends a step.
  cudaStream_t second() const { return is_store && !kernel_blocks ? staging->copies : staging->kernels; }

  void enqueue(const Step& step) {
    Staging::State& s = *staging;
    if (kernel_blocks) {
      run_kernel(step, Kind::kRaw, nullptr);
    } else {
      const cudaStream_t first = is_store ? s.kernels : s.copies;
      const u32 b = s.next++ % s.buffers;
      u8* buffer = s.ring + b * s.buffer_bytes;
      LMC_CUDA_CHECK(op, cudaStreamWaitEvent(first, s.free[b]));
      is_store ? run_kernels(step, buffer) : copy(step, buffer);
      LMC_CUDA_CHECK(op, cudaEventRecord(s.filled[b], first));
      LMC_CUDA_CHECK(op, cudaStreamWaitEvent(second(), s.filled[b]));
      is_store ? copy(step, buffer) : run_kernels(step, buffer);
      LMC_CUDA_CHECK(op, cudaEventRecord(s.free[b], second()));
    }
    if (plane != step.end) return;  // there are more chunks
    std::lock_guard<std::mutex> lock(mutex);
    reached.push_back({step.end, new_event(op)});
    LMC_CUDA_CHECK(op, cudaEventRecord(reached.back().event, is_store && !has_runs ? s.kernels : second()));
    changed.notify_all();
  }

  void end() {
    std::lock_guard<std::mutex> lock(mutex);
    over = true;
    changed.notify_all();
  }
};

Staging::Job::Job(std::unique_ptr<State> state) : state_(std::move(state)) {}
Staging::Job::~Job() = default;

void Staging::Job::go_on(u64 planes, const Event* behind) {
  State& j = *state_;
  Staging::State& s = *j.staging;
  std::lock_guard<std::mutex> lock(s.one_job);
  try {
    const DeviceGuard guard(j.op, s.device);
    const Range range(j.op);
    if (behind) {
      const auto event = static_cast<cudaEvent_t>(behind->event_);
      LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(s.kernels, event));
      if (j.has_runs) LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(s.copies, event));
    }
    for (Step step{}; !j.over && j.next_step(planes, step);) j.enqueue(step);
    LMC_CUDA_CHECK(j.op, cudaEventRecord(j.finished, j.second()));
    j.under_way = true;
  } catch (...) {
    // Wait for what was enqueued before the exception propagates, because the caller may then reuse the memory.
    on_device(s.device, [&s] { s.synchronize(); });
    j.under_way = false;
    j.plane = 0;  // discard the job's progress
    j.end();
    throw;
  }
}

void Staging::Job::order(void* stream, u64 planes) const {
  State& j = *state_;
  const auto is_reached = [planes](const State::Reached& one) { return one.planes >= planes; };
  std::unique_lock<std::mutex> lock(j.mutex);
  auto found = j.reached.end();
  j.changed.wait(lock, [&] {
    found = std::find_if(j.reached.begin(), j.reached.end(), is_reached);
    return found != j.reached.end() || j.over || j.chunks.empty();
  });
  if (found == j.reached.end()) return;  // nothing is under way
  const DeviceGuard guard(j.op, j.staging->device);
  refuse_capture(j.op, stream);
  LMC_CUDA_CHECK(j.op, cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), found->event));
}

std::vector<i64> Staging::Job::wait() {
  State& j = *state_;
  if (j.under_way) {
    const DeviceGuard guard(j.op, j.staging->device);
    LMC_CUDA_CHECK(j.op, cudaEventSynchronize(j.finished));
    j.under_way = false;
  }
  j.end();
  if (j.plane != j.ends.back())
    throw std::runtime_error(std::string(j.op) + ": it ended at plane " + std::to_string(j.plane) + " of " +
                             std::to_string(j.ends.back()));
  std::vector<i64> checksums(j.checksums ? j.chunks.size() * j.sums_per_chunk() : 0);
  for (const State::Sums& made : j.sums) {
    const std::vector<u64> of_step = made.partial.add_up(made.sums);
    for (std::size_t i = 0; i < of_step.size(); ++i)
      checksums[made.of[i]] = static_cast<i64>(static_cast<u64>(checksums[made.of[i]]) + of_step[i]);
  }
  return checksums;
}

Staging::Staging(int device, u8* ring, u64 buffer_bytes, u32 buffers, bool urgent, u32 max_blocks)
    : state_(new State{device, ring, buffer_bytes, buffers, max_blocks}) {
  const char* op = "staging";
  if (buffers < 2 || buffer_bytes % kAlignment || reinterpret_cast<u64>(ring) % kAlignment)
    throw std::invalid_argument("staging: expected at least 2 buffers of a multiple of 256 bytes, aligned to 256");
  State& s = *state_;
  const DeviceGuard guard(op, device);
  if (max_blocks == 0) s.max_blocks = blocks_for_bus(op, device);
  int least = 0, greatest = 0;
  LMC_CUDA_CHECK(op, cudaDeviceGetStreamPriorityRange(&least, &greatest));
  for (cudaStream_t* stream : {&s.kernels, &s.copies})
    LMC_CUDA_CHECK(op, cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, urgent ? greatest : least));
  nvtxNameCudaStreamA(s.kernels, urgent ? "lmcache_mm load: kernels" : "lmcache_mm store: kernels");
  nvtxNameCudaStreamA(s.copies, urgent ? "lmcache_mm load: copies" : "lmcache_mm store: copies");
  for (u32 b = 0; b < buffers; ++b) {
    s.filled.push_back(new_event(op));
    s.free.push_back(new_event(op));
  }
  load_page_copies(op);
  for (u64 i = 0; i < kPinnedBlocks; ++i) s.pinned.push_back(State::allocate(op, kPinnedBytes));
}

Staging::~Staging() {
  on_device(state_->device, [this] { state_->synchronize(); });
}

std::unique_ptr<Staging::Job> Staging::begin(std::unique_ptr<Job::State> state, u64 fragment_bytes) {
  if (state->ends.empty() || state->ends.back() != state->cache.planes.size())
    throw std::invalid_argument(std::string(state->op) + ": expected layers that end at the last plane");
  state->prepare(fragment_bytes);
  return std::unique_ptr<Job>(new Job(std::move(state)));
}

std::unique_ptr<Staging::Job> Staging::store(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends,
                                             bool checksums, u64 fragment_bytes, u32 kernel_blocks,
                                             std::vector<bool> coded) {
  return begin(std::unique_ptr<Job::State>(new Job::State{"store", true, checksums, state_, cache, std::move(chunks),
                                                          std::move(ends), kernel_blocks, std::move(coded)}),
               fragment_bytes);
}

std::unique_ptr<Staging::Job> Staging::load(const PagedCache& cache, std::vector<Chunk> chunks, std::vector<u64> ends,
                                            bool checksums, const Event& behind, u64 fragment_bytes, u32 kernel_blocks,
                                            std::vector<bool> coded) {
  std::unique_ptr<Job> job =
      begin(std::unique_ptr<Job::State>(new Job::State{"load", false, checksums, state_, cache, std::move(chunks),
                                                       std::move(ends), kernel_blocks, std::move(coded)}),
            fragment_bytes);
  job->go_on(job->state_->ends.front(), &behind);
  return job;
}

}  // namespace lmc::cuda
