// Tests of the stand-in itself: correct scenarios must pass under every seed, wrong ones must be reported.
//
//   selftest SCENARIO SEED   exit status 0 if the results are right, 1 if they are wrong
//
// test_stand_in.py knows which scenarios are wrong, and what must happen then.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "batch_copy.h"
#include "bulk_copy.h"
#include "launch.h"
#include "ops.h"

using namespace lmc;

namespace {

constexpr u32 kThreads = 64, kBlocks = 4;

bool wrong_results = false;
u32 host_word = 0;

void expect(bool condition) { wrong_results |= !condition; }

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorName(error));
  std::exit(2);
}

template <typename T>
T* on_device(u32 count) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, count * sizeof(T)));
  return static_cast<T*>(pointer);
}
template <typename T>
T* pinned(u32 count) {
  void* pointer = nullptr;
  check(cudaMallocHost(&pointer, count * sizeof(T)));
  return static_cast<T*>(pointer);
}
cudaStream_t new_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, flags));
  return stream;
}
cudaEvent_t new_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}
template <typename T>
void copy(T* to, const T* from, u32 count, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDefault, stream));
}
template <typename T>
std::vector<T> to_host(const T* from, u32 count) {
  std::vector<T> out(count);
  check(cudaDeviceSynchronize());
  copy(out.data(), from, count, nullptr);
  return out;
}

// --- Kernels

enum class Mistake { kNone, kNoBarrier, kNoSyncWarp, kNoShuffle };

struct Sums {
  u32 of_warp[kThreads / 32];
  u32 neighbour[kThreads];
};

// out[block] = the sum over the block's threads of (thread + block) and of the neighbor's value in shared memory.
template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads) sum_block(u32* out) {
  Sums& shared = shared_memory<Sums>();
  const u32 thread = threadIdx.x;
  shared.neighbour[thread] = thread + blockIdx.x;
  if (kMistake != Mistake::kNoSyncWarp) __syncwarp();
  u32 sum = shared.neighbour[thread ^ 1];
  for (u32 step = 16; step > 0; step /= 2)
    sum += kMistake == Mistake::kNoShuffle ? sum : __shfl_xor_sync(0xFFFFFFFF, sum, step);
  if (thread % 32 == 0) shared.of_warp[thread / 32] = sum;
  if (kMistake != Mistake::kNoBarrier) __syncthreads();
  if (thread == 0) out[blockIdx.x] = shared.of_warp[0] + shared.of_warp[1];
}

__global__ void write_index(u32* out, u32 add) { out[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x + add; }
__global__ void add_one(const u32* in, u32* out) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i] + 1;
}
__global__ void write_same_word(u32* out) { *out = 7; }
__global__ void add_to_same_word(u32* out) { atomicAdd(out, 1u); }
__global__ void wait_for_nobody() {
  if (threadIdx.x % 32 != 5) __shfl_sync(0xFFFFFFFF, 1u, 0);
}
__global__ void shuffle_in_part_of_a_warp() { __shfl_sync(0xFFFFFFFF, 1u, 0); }
__global__ void shuffle_from_outside_the_mask() { __shfl_sync(0x0000FFFF << (threadIdx.x & 16), 1u, 31 - threadIdx.x); }
__global__ void shuffle_at_two_places(u32* out) {
  if (threadIdx.x & 1)
    *out = __shfl_sync(0xFFFFFFFF, 1u, 0);
  else
    *out = __shfl_sync(0xFFFFFFFF, 2u, 0);
}
__global__ void barrier_in_a_branch() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_that_some_skip() {
  if (threadIdx.x != 3) __syncthreads();
}
__global__ void barrier_and_collective() {
  if (threadIdx.x == 3)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void read_unwritten_shared(u32* out) { *out = shared_memory<u32>(); }
__global__ void index_shared(u32* out, u32 i) {
  u32* words = &shared_memory<u32>();
  words[i] = 1;
  *out = words[i];
}
__global__ void store_vector(u32* out) { *reinterpret_cast<uint4*>(out) = make_uint4(1, 2, 3, 4); }
__global__ void loop(volatile u32* out) {
  while (*out != 1234567) {
  }
}

struct Tile {
  BulkBarrier filled;
  alignas(16) u32 words[kThreads];
};

// A copy through shared memory by the bulk copy engine, with `arrivals` threads at its barrier.
__global__ void copy_in_bulk(const u32* in, u32* out, u32 arrivals, u32 bytes) {
  Tile& tile = shared_memory<Tile>();
  tile.filled.init(1);
  tile.filled.load(tile.words, in, bytes);
  for (u32 i = 0; i < arrivals; ++i) tile.filled.arrive();
  tile.filled.wait(0);
  bulk_store(out, tile.words, bytes);
  commit_bulk_stores();
  wait_for_bulk_stores();
}
__global__ void copy_in_bulk_from_in_front() {
  Tile& tile = shared_memory<Tile>();
  tile.filled.init(1);
  bulk_store(tile.words, reinterpret_cast<u8*>(&tile) - sizeof(Tile), sizeof(Tile));
}
__global__ void barrier_outside_of_shared_memory(u32* out) { reinterpret_cast<BulkBarrier*>(out)->init(1); }

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), u32 blocks, u32 threads, u32 shared_bytes, const Arguments&... arguments) {
  check(launch(kernel, dim3(blocks), dim3(threads), shared_bytes, nullptr, arguments...));
  check(cudaDeviceSynchronize());
}

// --- Scenarios

template <Mistake kMistake>
void block_sum() {
  u32* out = on_device<u32>(kBlocks);
  run(sum_block<kMistake>, kBlocks, kThreads, sizeof(Sums), out);
  const std::vector<u32> sums = to_host(out, kBlocks);
  for (u32 b = 0; b < kBlocks; ++b) expect(sums[b] == kThreads * (kThreads - 1) / 2 + kThreads * b);
}

// Two numbers go to the device through one pinned word.
template <bool kWait>
void reuse_pinned() {
  u32 *word = pinned<u32>(1), *out = on_device<u32>(2);
  const cudaStream_t stream = new_stream();
  const cudaEvent_t copied = new_event();
  for (u32 i = 0; i < 2; ++i) {
    if (kWait && i > 0) check(cudaEventSynchronize(copied));
    *word = 10 + i;
    copy(out + i, word, 1, stream);
    check(cudaEventRecord(copied, stream));
  }
  const std::vector<u32> got = to_host(out, 2);
  expect(got[0] == 10 && got[1] == 11);
}

// One stream writes what another reads.
template <bool kWait>
void two_streams() {
  u32 *first = on_device<u32>(kThreads), *second = on_device<u32>(kThreads);
  const cudaStream_t writer = new_stream(), reader = new_stream();
  const cudaEvent_t written = new_event();
  check(cudaMemsetAsync(first, 0, kThreads * sizeof(u32), writer));
  check(launch(write_index, dim3(1), dim3(kThreads), 0, writer, first, 5u));
  check(cudaEventRecord(written, writer));
  if (kWait) check(cudaStreamWaitEvent(reader, written));
  check(launch(add_one, dim3(1), dim3(kThreads), 0, reader, first, second));
  check(cudaStreamSynchronize(reader));
  const std::vector<u32> got = to_host(second, kThreads);
  for (u32 t = 0; t < kThreads; ++t) expect(got[t] == t + 6);
}

// The NULL stream and blocking streams wait for each other, and for no other streams.
template <bool kBlocking>
void null_stream() {
  u32 *first = on_device<u32>(kThreads), *second = on_device<u32>(kThreads), *third = on_device<u32>(kThreads);
  const cudaStream_t stream = new_stream(kBlocking ? cudaStreamDefault : cudaStreamNonBlocking);
  check(launch(write_index, dim3(1), dim3(kThreads), 0, stream, first, 5u));
  check(launch(add_one, dim3(1), dim3(kThreads), 0, nullptr, first, second));
  check(launch(add_one, dim3(1), dim3(kThreads), 0, stream, second, third));
  const std::vector<u32> got = to_host(third, kThreads);
  for (u32 t = 0; t < kThreads; ++t) expect(got[t] == t + 7);
}

void pageable_is_staged() {
  u32 word = 1, *out = on_device<u32>(1);
  copy(out, &word, 1, new_stream());
  word = 2;
  expect(to_host(out, 1)[0] == 1);
}

void event_means_its_last_record() {
  u32 *word = pinned<u32>(1), *out = on_device<u32>(1);
  const cudaStream_t stream = new_stream();
  const cudaEvent_t event = new_event();
  check(cudaEventSynchronize(event));
  check(cudaEventRecord(event, stream));
  *word = 3;
  copy(out, word, 1, stream);
  check(cudaEventRecord(event, stream));
  check(cudaEventDestroy(new_event()));
  while (cudaEventQuery(event) == cudaErrorNotReady) {
  }
  *word = 4;
  expect(to_host(out, 1)[0] == 3);
  cudaGetLastError();
}

void host_function_runs_in_its_place() {
  u32 *word = pinned<u32>(1), *out = on_device<u32>(2);
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  *word = 1;
  copy(out, word, 1, stream);
  check(cudaLaunchHostFunc(stream, [](void* data) { *static_cast<u32*>(data) = 2; }, word));
  copy(out + 1, word, 1, stream);
  while (cudaStreamQuery(stream) == cudaErrorNotReady) cudaGetLastError();
  expect(*word == 2);
  const std::vector<u32> got = to_host(out, 2);
  expect(got[0] == 1 && got[1] == 2);
  check(cudaStreamDestroy(stream));
}

void registered_memory_is_pinned() {
  std::vector<u32> words(100, 9);
  expect(cudaHostUnregister(words.data()) == cudaErrorHostMemoryNotRegistered);
  check(cudaHostRegister(words.data(), 400, cudaHostRegisterDefault));
  expect(cudaHostRegister(words.data() + 50, 4, 0) == cudaErrorHostMemoryAlreadyRegistered);
  run(write_index, 1, 100, 0, words.data(), 1u);
  check(cudaHostUnregister(words.data()));
  for (u32 i = 0; i < 100; ++i) expect(words[i] == i + 1);
  expect(cudaGetLastError() == cudaErrorHostMemoryAlreadyRegistered && cudaGetLastError() == cudaSuccess);
}

void host_memory_is_registered_in_pieces() {
  std::vector<u32> words(100, 9);
  lmc::cuda::register_host(1, words.data(), 400, 160);
  expect(cudaHostRegister(words.data() + 99, 4, 0) == cudaErrorHostMemoryAlreadyRegistered);
  for (const int first : {0, 40, 80}) expect(cudaHostUnregister(words.data() + first) == cudaSuccess);
  expect(cudaHostUnregister(words.data() + 1) == cudaErrorHostMemoryNotRegistered);

  lmc::cuda::register_host(0, words.data(), 400, 160);
  lmc::cuda::unregister_host(1, words.data(), 400, 160);
  check(cudaHostRegister(words.data() + 80, 4, cudaHostRegisterDefault));  // in the way of the last piece
  cudaGetLastError();
  bool thrown = false;
  try {
    lmc::cuda::register_host(0, words.data(), 400, 160);
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()).find("register_host: cudaErrorHostMemoryAlreadyRegistered") == 0;
  }
  expect(thrown);
  expect(cudaGetLastError() == cudaSuccess);
  expect(cudaHostUnregister(words.data()) == cudaErrorHostMemoryNotRegistered);
  expect(cudaHostUnregister(words.data() + 80) == cudaSuccess);
  int device = -1;
  check(cudaGetDevice(&device));
  expect(device == 0);
}

void errors_are_those_of_cuda() {
  u32* out = on_device<u32>(1);
  const auto launched = [&](u32 blocks, u32 threads, u32 shared_bytes, cudaStream_t stream) {
    return launch(read_unwritten_shared, dim3(blocks), dim3(threads), shared_bytes, stream, out);
  };
  expect(launched(0, 1, 4, nullptr) == cudaErrorInvalidConfiguration);
  expect(launched(1, 1025, 4, nullptr) == cudaErrorInvalidConfiguration);
  expect(launched(1, 1, 49 << 10, nullptr) == cudaErrorInvalidValue);
  check(cudaFuncSetAttribute(read_unwritten_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10));
  expect(launched(1, 1, 49 << 10, nullptr) == cudaSuccess);
  const cudaStream_t stream = new_stream();
  const cudaEvent_t event = new_event();
  check(cudaSetDevice(1));
  expect(launched(1, 1, 49 << 10, nullptr) == cudaErrorInvalidValue);  // the other device's attribute
  expect(launched(1, 1, 4, stream) == cudaErrorInvalidResourceHandle);
  expect(cudaEventRecord(event, nullptr) == cudaErrorInvalidResourceHandle);
  expect(cudaSetDevice(2) == cudaErrorInvalidDevice);
  host_cuda::calls().until_failure = 2;
  expect(cudaEventQuery(event) == cudaSuccess && cudaEventQuery(event) == cudaErrorUnknown);
  check(cudaSetDevice(0));
  check(cudaDeviceSynchronize());
}

// Work that a stream is given while it is captured runs on each launch of the graph, on the bytes that are there then.
void graph_replays() {
  const cudaStream_t stream = new_stream();
  const cudaEvent_t event = new_event();
  u32 *words = on_device<u32>(1), *in = pinned<u32>(1), pageable = 0;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  copy(words, in, 1, stream);
  check(launch(add_to_same_word, dim3(kBlocks), dim3(kThreads), 0, stream, words));
  check(cudaEventRecord(event, stream));
  expect(cudaEventQuery(event) == cudaErrorCapturedEvent && cudaEventSynchronize(event) == cudaErrorCapturedEvent);
  expect(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
  expect(cudaStreamQuery(stream) == cudaErrorStreamCaptureUnsupported);
  expect(cudaMemcpyAsync(words, &pageable, 4, cudaMemcpyDefault, stream) == cudaErrorStreamCaptureUnsupported);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph));
  for (u32 first : {5u, 9u}) {
    *in = first;
    check(cudaGraphLaunch(executable, stream));
    check(cudaStreamSynchronize(stream));
    expect(to_host(words, 1)[0] == first + kBlocks * kThreads);
  }
  check(cudaGraphDestroy(graph));
  check(cudaGraphExecDestroy(executable));
}

template <typename... Parameters, typename... Arguments>
auto kernel(void (*function)(Parameters...), u32 threads, u32 shared_bytes, const Arguments&... arguments) {
  return [=] { run(function, 1, threads, shared_bytes, arguments...); };
}

}  // namespace

int main(int, char** argv) {
  host_cuda::seed(std::strtoull(argv[2], nullptr, 0));
  host_cuda::options().watchdog_seconds = 1;
  u32* words = on_device<u32>(kThreads);
  const std::map<std::string, std::function<void()>> scenarios = {
      {"block_sum", block_sum<Mistake::kNone>},
      {"block_sum without its barrier", block_sum<Mistake::kNoBarrier>},
      {"block_sum without its warp barrier", block_sum<Mistake::kNoSyncWarp>},
      {"block_sum without its shuffle", block_sum<Mistake::kNoShuffle>},
      {"reuse_pinned", reuse_pinned<true>},
      {"reuse_pinned without its wait", reuse_pinned<false>},
      {"two_streams", two_streams<true>},
      {"two_streams without their event", two_streams<false>},
      {"null_stream", null_stream<true>},
      {"null_stream and one that does not block", null_stream<false>},
      {"pageable_is_staged", pageable_is_staged},
      {"event_means_its_last_record", event_means_its_last_record},
      {"host_function_runs_in_its_place", host_function_runs_in_its_place},
      {"registered_memory_is_pinned", registered_memory_is_pinned},
      {"host_memory_is_registered_in_pieces", host_memory_is_registered_in_pieces},
      {"errors_are_those_of_cuda", errors_are_those_of_cuda},
      {"graph_replays", graph_replays},
      {"add_to_same_word",
       [=] {
         check(cudaMemsetAsync(words, 0, 4));
         run(add_to_same_word, kBlocks, kThreads, 0, words);
         expect(to_host(words, 1)[0] == kBlocks * kThreads);
       }},
      {"write_same_word", [=] { run(write_same_word, 2, 1, 0, words); }},
      {"copy_in_bulk",
       [=] {
         u32* out = on_device<u32>(kThreads);
         check(launch(write_index, dim3(1), dim3(kThreads), 0, nullptr, words, 1u));
         run(copy_in_bulk, 1, 1, sizeof(Tile), words, out, 1u, u32{sizeof(Tile::words)});
         const std::vector<u32> got = to_host(out, kThreads);
         for (u32 t = 0; t < kThreads; ++t) expect(got[t] == t + 1);
       }},
      {"more arrivals than expected", kernel(copy_in_bulk, 1, sizeof(Tile), words, words, 2u, 16u)},
      {"a bulk copy that is not aligned", kernel(copy_in_bulk, 1, sizeof(Tile), words + 1, words, 1u, 16u)},
      {"a bulk copy in front of shared memory", kernel(copy_in_bulk_from_in_front, 1, sizeof(Tile))},
      {"a barrier outside of shared memory", kernel(barrier_outside_of_shared_memory, 1, sizeof(Tile), words)},
      {"a batch of copies without a context",
       [=] {
         const cudaStream_t stream = new_stream();
         u8* in = pinned<u8>(16);
         std::thread([=] {
           try {
             copy_fragments("copy", {{reinterpret_cast<u8*>(words), in, 16}}, false, true, stream);
           } catch (const std::runtime_error& error) {
             std::printf("%s\n", error.what());
             wrong_results = true;
           }
         }).join();
       }},
      {"an event of a capture",
       [=] {
         const cudaStream_t stream = new_stream();
         const cudaEvent_t event = new_event();
         check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
         check(cudaEventRecord(event, stream));
         check(cudaStreamWaitEvent(new_stream(), event));
       }},
      {"read_unwritten_shared",
       [=] {
         run(read_unwritten_shared, 1, 1, 4, words);
         expect(to_host(words, 1)[0] == 0xA5A5A5A5);
       }},
      {"wait_for_nobody", kernel(wait_for_nobody, 32, 0)},
      {"shuffle_in_part_of_a_warp", kernel(shuffle_in_part_of_a_warp, 48, 0)},
      {"shuffle_from_outside_the_mask", kernel(shuffle_from_outside_the_mask, 32, 0)},
      {"shuffle_at_two_places", kernel(shuffle_at_two_places, 32, 0, words)},
      {"barrier_in_a_branch", kernel(barrier_in_a_branch, 64, 0)},
      {"barrier_that_some_skip", kernel(barrier_that_some_skip, 64, 0)},
      {"barrier_and_collective", kernel(barrier_and_collective, 32, 0)},
      {"too little shared memory", kernel(read_unwritten_shared, 1, 2, words)},
      {"shared memory overrun", kernel(index_shared, 1, 400, words, 100u)},
      {"device memory overrun", kernel(write_index, kThreads + 1, 0, words, 1u)},
      {"device memory underrun", kernel(write_index, 1, 0, words - 1, 1u)},
      {"misaligned vector", kernel(store_vector, 1, 0, words + 1)},
      {"loop", kernel(loop, 1, 0, words)},
      {"host pointer in a kernel", kernel(write_index, 1, 0, &host_word, 1u)},
      {"host pointer in a copy",
       [=] { check(cudaMemcpyAsync(&host_word, words, 4, cudaMemcpyDeviceToDevice, nullptr)); }},
      {"copy overrun", [=] { copy(words, pinned<u32>(1), 2, nullptr); }},
      {"device memory on the host", [=] { expect(*words == 1); }},
      {"freed too early",
       [=] {
         check(launch(write_index, dim3(1), dim3(kThreads), 0, nullptr, words, 1u));
         check(cudaFree(words));
         check(cudaDeviceSynchronize());
       }},
      {"freed twice",
       [=] {
         check(cudaFree(words));
         check(cudaFree(words));
       }},
      {"destroyed event",
       [=] {
         const cudaEvent_t event = new_event();
         check(cudaEventDestroy(event));
         check(cudaEventRecord(event, nullptr));
       }},
      {"destroyed stream",
       [=] {
         const cudaStream_t stream = new_stream();
         check(cudaStreamDestroy(stream));
         check(launch(write_index, dim3(1), dim3(1), 0, stream, words, 1u));
       }},
  };
  const auto scenario = scenarios.find(argv[1]);
  if (scenario == scenarios.end()) return 3;
  scenario->second();
  check(cudaDeviceSynchronize());
  return wrong_results;
}
