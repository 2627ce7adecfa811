// A stand-in for this CUDA header: a C++ compiler compiles whole, unmodified .cu files against it. They run on the
// host, where AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer see every access.
//
//   g++ -std=c++17 -x c++ -DLMC_HOST_CUDA -Itests/host_cuda -Icsrc ...   (and kernels.cpp, streams.cpp: without
//   -fsanitize)
//
// Threads of a block are coroutines, and ThreadSanitizer sees each as a separate thread. Their order is drawn from a
// seed, so it can be repeated; a barrier that cannot complete is found at once; and two accesses that CUDA does not
// order are a race in any order. Streams are queues, see streams.cpp. Undefined behavior of CUDA (a barrier that some
// threads miss, a shuffle with an absent lane) ends the program with a message.
//
// Features that csrc/ does not use are missing, so that code with them does not compile: __shared__ (use
// lmc::shared_memory), votes, __threadfence, cooperative groups, graphs except those of one captured stream. A loop
// that spins on a plain load never yields: the watchdog ends it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// --- Types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define HOST_CUDA_ERRORS(x)                                                                                         \
  x(cudaSuccess, 0) x(cudaErrorInvalidValue, 1) x(cudaErrorMemoryAllocation, 2) x(cudaErrorInvalidConfiguration, 9) \
      x(cudaErrorNoDevice, 100) x(cudaErrorInvalidDevice, 101) x(cudaErrorInvalidResourceHandle, 400)               \
          x(cudaErrorNotReady, 600) x(cudaErrorHostMemoryAlreadyRegistered, 712)                                    \
              x(cudaErrorHostMemoryNotRegistered, 713) x(cudaErrorStreamCaptureUnsupported, 900)                    \
                  x(cudaErrorCapturedEvent, 907) x(cudaErrorUnknown, 999)
enum cudaError_t {
#define HOST_CUDA_ENUMERATOR(name, value) name = value,
  HOST_CUDA_ERRORS(HOST_CUDA_ENUMERATOR)
#undef HOST_CUDA_ENUMERATOR
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrHostNativeAtomicSupported = 86,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };

struct cudaFuncAttributes {
  int ptxVersion;  // options().compute_capability
};
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, warpSize, l2CacheSize;
};
struct cudaPointerAttributes {
  cudaMemoryType type;
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = cudaGraph_t;
using cudaHostFn_t = void (*)(void*);

#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(1))
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;
constexpr unsigned cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2;

// --- Runtime API

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned flags);
cudaError_t cudaMallocHost(void** pointer, std::size_t bytes);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaHostRegister(void* pointer, std::size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* pointer);
cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned flags);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t = nullptr);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);

cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace host_cuda {

// --- For tests: the device's properties, the order of operations, and failures

struct Options {
  int devices = 2;
  int multiprocessors = 2;
  int compute_capability = 90;
  int batch_copies = 1;       // cuMemcpyBatchAsync in the driver: 0 is missing, 1 works, 2 returns not supported
  int watchdog_seconds = 60;  // limit for one operation of a stream; 0: none
};
Options& options();

// Counters of the calling host thread.
struct Calls {
  int until_failure = 0;                   // n > 0: the n-th call from now that can fail returns cudaErrorUnknown
  std::uint64_t most_blocks = 0;           // the largest grid launched since this was set to 0
  std::uint64_t waits = 0;                 // how often a call has waited for the device
  std::uint64_t devices = 0;               // bit n: a call has created or found a context on device n
  std::uint64_t launches = 0, copies = 0;  // how many kernels, and how many copies or batches of them, were enqueued
  std::uint64_t delays = 0;  // how often a launch has loaded its kernel, or a call has allocated pinned memory
};
Calls& calls();

// Restarts the scheduler's random numbers. Of three consecutive seeds, one runs all work as late as is legal, one runs
// it at the call, and one mixes both at random. The first seed is the environment variable HOST_CUDA_SEED.
void seed(std::uint64_t value);

// Ends the program with a message. It names the kernel and thread that are running, if any.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- For the templates below.

struct Site {
  const char* file;
  int line;
};
// Parameters of functions that kernels call: the location of the call.
#define HOST_CUDA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Collective { kSyncWarp, kShuffle };

// One collective of the lanes of `mask`. `value`: of this lane; `source`: the lane whose value is returned.
std::uint64_t meet(Collective kind, unsigned mask, std::uint64_t value, unsigned source, Site site);
unsigned lane();

// Runs before each atomic access, which is relaxed: may switch to another thread.
void before_atomic();

void* shared_memory(std::size_t bytes);

// Whether these bytes are device or pinned memory.
bool is_device_accessible(const void* pointer, std::size_t bytes);

// Barriers in shared memory, and bulk copies. Copies run some time after they were issued, in any order: a store reads
// shared memory at one time and writes at another.
void mbarrier_init(const void* barrier, unsigned arrivals);
void mbarrier_load(const void* barrier, void* to, const void* from, std::size_t bytes);
void mbarrier_arrive(const void* barrier);
void mbarrier_wait(const void* barrier, unsigned parity);
void fence_for_bulk_copies();
void bulk_store(void* to, const void* from, std::size_t bytes);
void commit_bulk_stores();
void wait_for_bulk_reads(unsigned pending);
void wait_for_bulk_stores();

struct Kernel {
  const void* function;
  dim3 grid, block;
  std::size_t shared_bytes, parameter_bytes;
  int compute_capability = options().compute_capability;
};
cudaError_t launch(const Kernel& kernel, cudaStream_t stream, std::function<void()> call_one_thread,
                   std::initializer_list<const void*> pointer_parameters);

template <typename T>
const void* pointer_parameter(const T& parameter) {
  if constexpr (std::is_pointer_v<T>)
    return const_cast<const void*>(static_cast<const volatile void*>(parameter));
  else
    return nullptr;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "CUDA shuffles 4 and 8 byte numbers");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet(Collective::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace host_cuda

// --- Device side

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

void __syncthreads(HOST_CUDA_SITE);

inline void __syncwarp(unsigned mask = ~0u, HOST_CUDA_SITE) {
  host_cuda::meet(host_cuda::Collective::kSyncWarp, mask, 0, 0, {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source, HOST_CUDA_SITE) {
  return host_cuda::shuffle(mask, value, source, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, HOST_CUDA_SITE) {
  return host_cuda::shuffle(mask, value, host_cuda::lane() ^ lanes, {file, line});
}

// The bytes of `low` and `high` that the nibbles of `chosen` number, from the lowest.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
  const std::uint64_t both = low | static_cast<std::uint64_t>(high) << 32;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> 8 * (chosen >> 4 * i & 7) & 0xFF) << 8 * i;
  return out;
}

inline bool __isGlobal(const void* pointer) { return host_cuda::is_device_accessible(pointer, 1); }
#define __builtin_assume(claim) ((claim) ? void() : host_cuda::fail("%s:%d: %s is false", __FILE__, __LINE__, #claim))

// Only the types that csrc/ uses. CUDA has no overload for unsigned long.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  host_cuda::before_atomic();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  host_cuda::before_atomic();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// --- launch.h

namespace lmc {

template <typename T>
T& shared_memory() {
  static_assert(alignof(T) <= 16, "shared memory is 16-byte aligned");
  return *static_cast<T*>(host_cuda::shared_memory(sizeof(T)));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied to the device as bytes");
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  const host_cuda::Kernel what{reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                               (std::size_t{0} + ... + sizeof(Parameters))};
  return host_cuda::launch(what, stream, [kernel, parameters] { std::apply(kernel, parameters); },
                           {host_cuda::pointer_parameter(static_cast<Parameters>(arguments))...});
}

}  // namespace lmc
