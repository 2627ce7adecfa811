// Transfers between the pages of a GPU and pinned host memory: staged through a ring of buffers in device memory,
// filled by kernels and emptied by the copy engine, or the other way round; by copies of long fragments straight from
// or to pages; or, loads, by a few blocks of a kernel that read the host's memory.
//
// A store, step by step, `>` for an event that one stream waits for:
//   kernels:  [behind] > [free b] > gather into b, record filled b ... record left_pages
//   copies:   [filled b] > payloads and checksums to the host, record free b ... record finished
// A load:
//   copies:   [free b] > payloads to b, record filled b
//   kernels:  [behind] > [filled b] > scatter from b, checksums to the host, record free b ... record left_pages,
//   finished
// Fragments are copied by `copies` too, which then waits for [behind]; a kernel sums up the pages that they come from,
// or have gone to. A buffer then holds the checksums only, as it does for a load by a kernel
// alone.
#include <cstring>
#include <mutex>
#include <utility>

#include "batch_copy.h"
#include "error.h"
#include "ops.h"

namespace lmc::cuda {
namespace {

constexpr u64 kAlignment = 256;

u64 align(u64 bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// For destructors, whose errors nobody can be told.
void quietly(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
}

cudaEvent_t new_event(const char* op) {
  cudaEvent_t event = nullptr;
  LMC_CUDA_CHECK(op, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

// How payloads travel.
enum class Path { kStaged, kFragments, kKernel };

// Chunks that share one buffer, and where in it each part lies.
struct Step {
  Path path;
  std::size_t first;  // of the call's chunks
  std::vector<Chunk> chunks;
  u64 sums_at;  // u64, one a chunk
  std::vector<u64> payloads_at;
  u64 bytes;
};

Step place(const PagedCache& cache, Path path, std::size_t first, std::vector<Chunk> chunks) {
  Step step{path, first, std::move(chunks), 0, {}, 0};
  step.bytes = align(step.sums_at + 8 * step.chunks.size());
  if (path != Path::kStaged) return step;
  for (const Chunk& chunk : step.chunks) {
    step.payloads_at.push_back(step.bytes);
    step.bytes = align(step.bytes + cache.payload_bytes(Mode::kPage, chunk));
  }
  return step;
}

// The fragments of a chunk of whole pages that are all there, if they are at least `least_bytes` long on average; else
// none.
std::vector<Fragment> long_fragments(const PagedCache& cache, const Chunk& chunk, u64 least_bytes) {
  std::vector<Fragment> fragments;
  const u64 bytes = cache.payload_bytes(Mode::kPage, chunk);
  if (least_bytes == 0 || bytes < least_bytes || cache.splits_pages(Mode::kPage, chunk)) return {};
  u8* payload = chunk.payload;
  for (u8* plane : cache.planes)
    for (u64 i = 0; i < chunk.count; ++i) {
      if (chunk.id(i) >= cache.num_pages) return {};
      for (u64 in_page = 0; in_page < cache.page_bytes; in_page += cache.run_bytes) {
        u8* run = plane + chunk.id(i) * cache.page_stride + in_page / cache.run_bytes * cache.run_stride;
        const bool begins_plane = i == 0 && in_page == 0;  // whose memory may be another allocation
        if (!fragments.empty() && !begins_plane && fragments.back().cache + fragments.back().bytes == run) {
          fragments.back().bytes += cache.run_bytes;
        } else {
          if (fragments.size() == bytes / least_bytes) return {};
          fragments.push_back({run, payload, cache.run_bytes});
        }
        payload += cache.run_bytes;
      }
    }
  return fragments;
}

std::vector<Step> steps_of(const char* op, const PagedCache& cache, const std::vector<Chunk>& chunks,
                           const std::vector<Path>& paths, u64 buffer_bytes) {
  std::vector<Step> steps;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (chunks[i].offset % kLaneBytes)
      throw std::invalid_argument(std::string(op) + ": chunk " + std::to_string(i) +
                                  ": expected an offset that is a multiple of 16, got " +
                                  std::to_string(chunks[i].offset));
    if (!steps.empty() && steps.back().path == paths[i]) {
      std::vector<Chunk> longer = steps.back().chunks;
      longer.push_back(chunks[i]);
      Step step = place(cache, paths[i], steps.back().first, std::move(longer));
      if (step.bytes <= buffer_bytes) {
        steps.back() = std::move(step);
        continue;
      }
    }
    steps.push_back(place(cache, paths[i], i, {chunks[i]}));
    if (steps.back().bytes > buffer_bytes)
      throw std::invalid_argument(std::string(op) + ": chunk " + std::to_string(i) + " needs a buffer of " +
                                  std::to_string(steps.back().bytes) + " bytes, and those of the ring have " +
                                  std::to_string(buffer_bytes));
  }
  return steps;
}

// How each chunk travels. Where that is not through the ring, its payload becomes what devices call it; memory that is
// not pinned has no such address, and goes through the ring.
std::vector<Path> choose_paths(const PagedCache& cache, std::vector<Chunk>& chunks, u64 fragment_bytes,
                               u32 kernel_blocks) {
  std::vector<Path> paths;
  for (Chunk& chunk : chunks) {
    Path path = Path::kStaged;
    if (kernel_blocks)
      path = Path::kKernel;
    else if (!long_fragments(cache, chunk, fragment_bytes).empty())
      path = Path::kFragments;
    if (path != Path::kStaged) {
      void* address = nullptr;
      if (cudaHostGetDevicePointer(&address, chunk.payload, 0) == cudaSuccess) {
        chunk.payload = static_cast<u8*>(address);
      } else {
        cudaGetLastError();
        path = Path::kStaged;
      }
    }
    paths.push_back(path);
  }
  return paths;
}

// The step's chunks as a kernel takes them.
std::vector<Chunk> for_kernel(const Step& step, u8* buffer) {
  std::vector<Chunk> chunks = step.chunks;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (step.path == Path::kStaged) chunks[i].payload = buffer + step.payloads_at[i];
    if (step.path == Path::kFragments) chunks[i].payload = nullptr;
  }
  return chunks;
}

std::vector<Fragment> all_fragments(const PagedCache& cache, const Step& step) {
  std::vector<Fragment> all;
  for (const Chunk& chunk : step.chunks) {
    const std::vector<Fragment> of_chunk = long_fragments(cache, chunk, 1);
    all.insert(all.end(), of_chunk.begin(), of_chunk.end());
  }
  return all;
}

}  // namespace

// Pinned memory for the checksums of jobs, which outlives them: to allocate and free it may wait for the device.
class Staging::Sums {
 public:
  struct Block {
    u64* host;
    std::size_t capacity;
  };

  ~Sums() {
    for (const Block& block : spare_) quietly(cudaFreeHost(block.host));
  }
  Block take(const char* op, std::size_t count) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (Block& block : spare_)
        if (block.capacity >= count) {
          std::swap(block, spare_.back());
          const Block taken = spare_.back();
          spare_.pop_back();
          return taken;
        }
    }
    std::size_t capacity = 64;
    while (capacity < count) capacity *= 2;
    void* host = nullptr;
    LMC_CUDA_CHECK(op, cudaHostAlloc(&host, 8 * capacity, cudaHostAllocPortable));
    return {static_cast<u64*>(host), capacity};
  }
  void give_back(const Block& block) {
    std::lock_guard<std::mutex> lock(mutex_);
    spare_.push_back(block);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> spare_;
};

struct Staging::Job::State {
  const char* op;
  int device;
  std::size_t count;
  std::shared_ptr<Sums> sums;
  Sums::Block block{};
  std::vector<Sums::Block> tables;
  cudaEvent_t left_pages = nullptr, finished = nullptr;
  bool under_way = false;
  std::vector<u64> results;

  void allocate() {
    left_pages = new_event(op);
    finished = new_event(op);
    block = sums->take(op, count);
  }
  // What gather and scatter need on a stream of the device.
  Launch on(cudaStream_t stream) {
    Launch where{device, stream};
    where.place_table = [this](const u8* table, u64 bytes) {
      tables.push_back(sums->take(op, (bytes + 7) / 8));
      std::memcpy(tables.back().host, table, bytes);
      return reinterpret_cast<const u8*>(tables.back().host);
    };
    return where;
  }
  ~State() {
    if (left_pages) quietly(cudaEventDestroy(left_pages));
    if (finished) quietly(cudaEventDestroy(finished));
    if (block.host) sums->give_back(block);
    for (const Sums::Block& table : tables) sums->give_back(table);
  }
};

Staging::Job::Job(std::unique_ptr<State> state) : state_(std::move(state)) {}

Staging::Job::~Job() {
  if (state_->under_way) quietly(cudaEventSynchronize(state_->finished));
}

void Staging::Job::order(void* stream) const {
  const DeviceGuard guard(state_->op, state_->device);
  LMC_CUDA_CHECK(state_->op, cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), state_->left_pages));
}

bool Staging::Job::finished() const {
  const cudaError_t state = cudaEventQuery(state_->finished);
  if (state != cudaErrorNotReady) {
    LMC_CUDA_CHECK(state_->op, state);
    return true;
  }
  cudaGetLastError();
  return false;
}

std::vector<u64> Staging::Job::wait() {
  if (!state_->under_way) return state_->results;
  LMC_CUDA_CHECK(state_->op, cudaEventSynchronize(state_->finished));
  state_->under_way = false;
  state_->results.assign(state_->block.host, state_->block.host + state_->count);
  return state_->results;
}

struct Staging::State {
  int device;
  u8* ring;
  u64 buffer_bytes;
  u32 buffers;
  std::shared_ptr<Sums> sums = std::make_shared<Sums>();
  cudaStream_t kernels = nullptr, copies = nullptr;
  cudaEvent_t behind = nullptr;
  std::vector<cudaEvent_t> filled, free;  // of each buffer
  u32 next = 0;

  ~State() {
    for (const cudaEvent_t event : filled) quietly(cudaEventDestroy(event));
    for (const cudaEvent_t event : free) quietly(cudaEventDestroy(event));
    if (behind) quietly(cudaEventDestroy(behind));
    if (kernels) quietly(cudaStreamDestroy(kernels));
    if (copies) quietly(cudaStreamDestroy(copies));
  }

  // Kernels come behind what the caller's stream holds now.
  void begin(const char* op, void* stream) {
    LMC_CUDA_CHECK(op, cudaEventRecord(behind, static_cast<cudaStream_t>(stream)));
    LMC_CUDA_CHECK(op, cudaStreamWaitEvent(kernels, behind));
  }

  std::unique_ptr<Job> new_job(const char* op, std::size_t count) const {
    auto job = std::make_unique<Job::State>(Job::State{op, device, count, sums});
    job->allocate();
    return std::unique_ptr<Job>(new Job(std::move(job)));
  }

  // What was enqueued ends before an exception leaves: its memory is the caller's again.
  template <typename Enqueue>
  void all_or_nothing(Job& job, const Enqueue& enqueue) {
    try {
      enqueue(*job.state_);
      job.state_->under_way = true;
    } catch (...) {
      quietly(cudaStreamSynchronize(copies));
      quietly(cudaStreamSynchronize(kernels));
      throw;
    }
  }
};

Staging::Staging(int device, u8* ring, u64 buffer_bytes, u32 buffers)
    : state_(std::make_unique<State>(State{device, ring, buffer_bytes, buffers})) {
  const char* op = "staging";
  if (buffers < 2 || buffer_bytes % kAlignment || reinterpret_cast<u64>(ring) % kAlignment)
    throw std::invalid_argument("staging: expected at least 2 buffers of a multiple of 256 bytes, aligned to 256");
  const DeviceGuard guard(op, device);
  int least = 0, greatest = 0;
  LMC_CUDA_CHECK(op, cudaDeviceGetStreamPriorityRange(&least, &greatest));
  LMC_CUDA_CHECK(op, cudaStreamCreateWithPriority(&state_->kernels, cudaStreamNonBlocking, greatest));
  LMC_CUDA_CHECK(op, cudaStreamCreateWithPriority(&state_->copies, cudaStreamNonBlocking, greatest));
  state_->behind = new_event(op);
  for (u32 b = 0; b < buffers; ++b) {
    state_->filled.push_back(new_event(op));
    state_->free.push_back(new_event(op));
  }
}

Staging::~Staging() {
  quietly(cudaStreamSynchronize(state_->copies));
  quietly(cudaStreamSynchronize(state_->kernels));
}

u64 Staging::least_buffer_bytes(const PagedCache& cache, u64 pages) {
  return place(cache, Path::kStaged, 0, {Chunk{nullptr, pages, pages * cache.page_tokens, nullptr, true}}).bytes;
}

std::unique_ptr<Staging::Job> Staging::store(const PagedCache& cache, std::vector<Chunk> chunks, void* stream,
                                             u64 fragment_bytes) {
  const char* op = "store";
  State& s = *state_;
  const DeviceGuard guard(op, s.device);
  const std::vector<Path> paths = choose_paths(cache, chunks, fragment_bytes, 0);
  const std::vector<Step> steps = steps_of(op, cache, chunks, paths, s.buffer_bytes);
  std::unique_ptr<Job> job = s.new_job(op, chunks.size());
  s.all_or_nothing(*job, [&](Job::State& j) {
    s.begin(op, stream);
    cudaStream_t reads_last = s.kernels;
    for (const Step& step : steps) {
      const u32 b = s.next++ % s.buffers;
      u8* buffer = s.ring + b * s.buffer_bytes;
      LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.kernels, s.free[b]));
      auto* sums = reinterpret_cast<u64*>(buffer + step.sums_at);
      gather(cache, Mode::kPage, for_kernel(step, buffer), true, sums, j.on(s.kernels));
      LMC_CUDA_CHECK(op, cudaEventRecord(s.filled[b], s.kernels));
      if (step.path == Path::kFragments) {
        LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.copies, s.behind));
        copy_fragments(op, all_fragments(cache, step), true, s.copies);
        reads_last = s.copies;  // which waits for kernels
      }
      LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.copies, s.filled[b]));
      for (std::size_t i = 0; i < step.payloads_at.size(); ++i)
        LMC_CUDA_CHECK(
            op, cudaMemcpyAsync(step.chunks[i].payload, buffer + step.payloads_at[i],
                                cache.payload_bytes(Mode::kPage, step.chunks[i]), cudaMemcpyDeviceToHost, s.copies));
      LMC_CUDA_CHECK(op, cudaMemcpyAsync(j.block.host + step.first, sums, 8 * step.chunks.size(),
                                         cudaMemcpyDeviceToHost, s.copies));
      LMC_CUDA_CHECK(op, cudaEventRecord(s.free[b], s.copies));
    }
    LMC_CUDA_CHECK(op, cudaEventRecord(j.left_pages, reads_last));
    LMC_CUDA_CHECK(op, cudaEventRecord(j.finished, s.copies));
  });
  return job;
}

std::unique_ptr<Staging::Job> Staging::load(const PagedCache& cache, std::vector<Chunk> chunks, bool checksums,
                                            void* stream, u64 fragment_bytes, u32 kernel_blocks) {
  const char* op = "load";
  State& s = *state_;
  const DeviceGuard guard(op, s.device);
  const std::vector<Path> paths = choose_paths(cache, chunks, fragment_bytes, kernel_blocks);
  const std::vector<Step> steps = steps_of(op, cache, chunks, paths, s.buffer_bytes);
  std::unique_ptr<Job> job = s.new_job(op, checksums ? chunks.size() : 0);
  s.all_or_nothing(*job, [&](Job::State& j) {
    s.begin(op, stream);
    for (const Step& step : steps) {
      const u32 b = s.next++ % s.buffers;
      u8* buffer = s.ring + b * s.buffer_bytes;
      auto* sums = checksums ? reinterpret_cast<u64*>(buffer + step.sums_at) : nullptr;
      Launch where = j.on(s.kernels);
      if (step.path == Path::kKernel) {
        where.max_blocks = kernel_blocks;
        where.payloads_on_host = true;
      } else {
        LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.copies, s.free[b]));
        for (std::size_t i = 0; i < step.payloads_at.size(); ++i)
          LMC_CUDA_CHECK(
              op, cudaMemcpyAsync(buffer + step.payloads_at[i], step.chunks[i].payload,
                                  cache.payload_bytes(Mode::kPage, step.chunks[i]), cudaMemcpyHostToDevice, s.copies));
        if (step.path == Path::kFragments) {
          LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.copies, s.behind));
          copy_fragments(op, all_fragments(cache, step), false, s.copies);
        }
        LMC_CUDA_CHECK(op, cudaEventRecord(s.filled[b], s.copies));
        LMC_CUDA_CHECK(op, cudaStreamWaitEvent(s.kernels, s.filled[b]));
      }
      if (step.path != Path::kFragments)
        scatter(cache, Mode::kPage, for_kernel(step, buffer), true, sums, where);
      else if (checksums)
        gather(cache, Mode::kPage, for_kernel(step, buffer), true, sums, where);
      if (checksums)
        LMC_CUDA_CHECK(op, cudaMemcpyAsync(j.block.host + step.first, sums, 8 * step.chunks.size(),
                                           cudaMemcpyDeviceToHost, s.kernels));
      LMC_CUDA_CHECK(op, cudaEventRecord(s.free[b], s.kernels));
    }
    LMC_CUDA_CHECK(op, cudaEventRecord(j.left_pages, s.kernels));
    LMC_CUDA_CHECK(op, cudaEventRecord(j.finished, s.kernels));
  });
  return job;
}

}  // namespace lmc::cuda
