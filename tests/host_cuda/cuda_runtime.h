// A stand-in for CUDA's header of this name: .cu files compile against it, unmodified and whole, with a C++ compiler
// and run on the host, where AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer see every access.
//
//   g++ -std=c++17 -x c++ -DLMC_HOST_CUDA -Itests/host_cuda -Icsrc ...   (and kernels.cpp, streams.cpp: without
//   -fsanitize)
//
// Threads of a block are coroutines, each of them a thread of its own to ThreadSanitizer: the order in which they run
// is drawn from a seed and so repeats, a barrier that cannot complete is found at once, and two accesses with nothing
// of CUDA's between them are a race whatever the order was. Streams are queues, see streams.cpp. What is undefined in
// CUDA (a barrier that some threads miss, a shuffle with an absent lane) ends the program with a message.
//
// Not here, so that code which needs it does not compile: __shared__ (use lmc::shared_memory), __activemask,
// cooperative groups, textures, managed memory, graphs but those of one captured stream. A loop that spins on a plain
// load never yields: the watchdog ends it.
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
#define __constant__
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

#define HOST_CUDA_VECTORS(T, name)                                                \
  struct __align__(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct __align__(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_CUDA_VECTORS(unsigned char, uchar)
HOST_CUDA_VECTORS(unsigned short, ushort)
HOST_CUDA_VECTORS(int, int)
HOST_CUDA_VECTORS(unsigned, uint)
HOST_CUDA_VECTORS(float, float)
HOST_CUDA_VECTORS(long long, longlong)
HOST_CUDA_VECTORS(unsigned long long, ulonglong)
#undef HOST_CUDA_VECTORS

#define HOST_CUDA_ERRORS(x)                                                                                           \
  x(cudaSuccess) x(cudaErrorInvalidValue) x(cudaErrorMemoryAllocation) x(cudaErrorInvalidConfiguration)               \
      x(cudaErrorInsufficientDriver) x(cudaErrorNoDevice) x(cudaErrorInvalidDevice) x(cudaErrorInvalidResourceHandle) \
          x(cudaErrorNotReady) x(cudaErrorHostMemoryAlreadyRegistered) x(cudaErrorHostMemoryNotRegistered)            \
              x(cudaErrorNotSupported) x(cudaErrorStreamCaptureUnsupported) x(cudaErrorCapturedEvent)                 \
                  x(cudaErrorUnknown)
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorCapturedEvent = 907,
  cudaErrorUnknown = 999,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrHostNativeAtomicSupported = 86,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
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
  int device;
  void* devicePointer;
  void* hostPointer;
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = cudaGraph_t;
using cudaHostFn_t = void (*)(void*);

#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(1))
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;
constexpr unsigned cudaHostAllocWriteCombined = 4;
constexpr unsigned cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2;
constexpr unsigned cudaHostRegisterReadOnly = 8;

// --- Runtime API

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
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
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
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

template <typename T>
cudaError_t cudaMalloc(T** pointer, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
template <typename T>
cudaError_t cudaHostAlloc(T** pointer, std::size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <typename T>
cudaError_t cudaMallocHost(T** pointer, std::size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(pointer), bytes);
}
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace host_cuda {

// --- For tests: what the device is like, what order things run in, what goes wrong.

struct Options {
  int devices = 2;
  int multiprocessors = 2;
  int blocks_per_multiprocessor = 2;  // what cudaOccupancyMaxActiveBlocksPerMultiprocessor answers at most
  int compute_capability = 90;
  int batch_copies = 1;       // what the driver makes of cuMemcpyBatchAsync: 0 does not know it, 2 does not support it
  int watchdog_seconds = 60;  // for one operation of a stream; 0: none
};
Options& options();

// Of the calling host thread.
struct Calls {
  int until_failure = 0;                   // n > 0: the n-th call from now that can fail does, with cudaErrorUnknown
  std::uint64_t most_blocks = 0;           // the greatest grid launched since this was set to 0
  std::uint64_t waits = 0;                 // how often a call has waited for the device
  std::uint64_t devices = 0;               // bit n: a call has made a context on device n, or found it there
  std::uint64_t launches = 0, copies = 0;  // how many kernels, and how many copies or batches of them, were enqueued
  std::uint64_t delays = 0;  // how often a launch has loaded its kernel, or a call has allocated pinned memory
};
Calls& calls();

// Restarts the scheduler's random numbers. Of three seeds in a row one leaves all work to the last moment that is
// legal, one does it all at the call, and one changes its mind. The first seed is the environment's HOST_CUDA_SEED.
void seed(std::uint64_t value);

// Ends the program with a message that names the kernel and thread that run, if one does.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- For the templates below.

struct Site {
  const char* file;
  int line;
};
// Parameters of what a kernel calls: where it calls it.
#define HOST_CUDA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Collective { kSyncWarp, kShuffle, kBallot, kAny, kAll, kReduceAdd };

// One meeting of the lanes of `mask`; `value` is what this lane brings, `source` the lane whose value it asks for.
std::uint64_t meet(Collective kind, unsigned mask, std::uint64_t value, unsigned source, Site site);
unsigned lane();

// Around every atomic access, for the memory model: relaxed, except what __threadfence makes of it.
void before_atomic(const void* address);
void after_atomic(const void* address);

void* shared_memory(std::size_t bytes);

// Whether these bytes are device or pinned memory.
bool is_device_accessible(const void* pointer, std::size_t bytes);

// Barriers in shared memory and bulk copies, which are made some time after they were begun, in any order: a store
// reads shared memory at one time and writes at another.
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
};
cudaError_t launch(const Kernel& kernel, cudaStream_t stream, std::function<void()> call_one_thread,
                   std::initializer_list<const void*> pointer_parameters);

int occupancy(int block_threads, std::size_t shared_bytes);

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

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int block_threads,
                                                          std::size_t shared_bytes) {
  *blocks = host_cuda::occupancy(block_threads, shared_bytes);
  return cudaSuccess;
}

// --- Device side

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

void __syncthreads(HOST_CUDA_SITE);
void __threadfence();
void __nanosleep(unsigned nanoseconds);

inline void __syncwarp(unsigned mask = ~0u, HOST_CUDA_SITE) {
  host_cuda::meet(host_cuda::Collective::kSyncWarp, mask, 0, 0, {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_CUDA_SITE) {
  const unsigned first = host_cuda::lane() & ~(width - 1u);
  return host_cuda::shuffle(mask, value, first + (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane(), source = lane ^ lanes;
  return host_cuda::shuffle(mask, value, source < (lane & ~(width - 1u)) + width ? source : lane, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane();
  return host_cuda::shuffle(mask, value, (lane & (width - 1u)) + lanes < unsigned(width) ? lane + lanes : lane,
                            {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, HOST_CUDA_SITE) {
  const unsigned lane = host_cuda::lane();
  return host_cuda::shuffle(mask, value, (lane & (width - 1u)) >= lanes ? lane - lanes : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_CUDA_SITE) {
  return host_cuda::meet(host_cuda::Collective::kBallot, mask, predicate != 0, 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, HOST_CUDA_SITE) {
  return host_cuda::meet(host_cuda::Collective::kAny, mask, predicate != 0, 0, {file, line});
}
inline int __all_sync(unsigned mask, int predicate, HOST_CUDA_SITE) {
  return host_cuda::meet(host_cuda::Collective::kAll, mask, predicate != 0, 0, {file, line});
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, HOST_CUDA_SITE) {
  return host_cuda::meet(host_cuda::Collective::kReduceAdd, mask, value, 0, {file, line});
}
inline int __reduce_add_sync(unsigned mask, int value, HOST_CUDA_SITE) {
  return host_cuda::meet(host_cuda::Collective::kReduceAdd, mask, unsigned(value), 0, {file, line});
}

inline bool __isGlobal(const void* pointer) { return host_cuda::is_device_accessible(pointer, 1); }
#define __builtin_assume(claim) ((claim) ? void() : host_cuda::fail("%s:%d: %s is false", __FILE__, __LINE__, #claim))

// Only the types that CUDA has: unsigned long is not among them.
#define HOST_CUDA_ATOMIC(T, name, expression) \
  inline T name(T* address, T value) {        \
    host_cuda::before_atomic(address);        \
    const T old = expression;                 \
    host_cuda::after_atomic(address);         \
    return old;                               \
  }
#define HOST_CUDA_ATOMIC_CHOICE(T, name, comparison)                                                        \
  inline T name(T* address, T value) {                                                                      \
    host_cuda::before_atomic(address);                                                                      \
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);                                                     \
    while (value comparison old &&                                                                          \
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                       \
    host_cuda::after_atomic(address);                                                                       \
    return old;                                                                                             \
  }
#define HOST_CUDA_ATOMICS(T)                                                                          \
  HOST_CUDA_ATOMIC(T, atomicAdd, __atomic_fetch_add(address, value, __ATOMIC_RELAXED))                \
  HOST_CUDA_ATOMIC(T, atomicAnd, __atomic_fetch_and(address, value, __ATOMIC_RELAXED))                \
  HOST_CUDA_ATOMIC(T, atomicOr, __atomic_fetch_or(address, value, __ATOMIC_RELAXED))                  \
  HOST_CUDA_ATOMIC(T, atomicXor, __atomic_fetch_xor(address, value, __ATOMIC_RELAXED))                \
  HOST_CUDA_ATOMIC(T, atomicExch, __atomic_exchange_n(address, value, __ATOMIC_RELAXED))              \
  HOST_CUDA_ATOMIC_CHOICE(T, atomicMin, <)                                                            \
  HOST_CUDA_ATOMIC_CHOICE(T, atomicMax, >)                                                            \
  inline T atomicCAS(T* address, T compare, T value) {                                                \
    host_cuda::before_atomic(address);                                                                \
    __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
    host_cuda::after_atomic(address);                                                                 \
    return compare;                                                                                   \
  }
HOST_CUDA_ATOMICS(int)
HOST_CUDA_ATOMICS(unsigned)
HOST_CUDA_ATOMICS(unsigned long long)
#undef HOST_CUDA_ATOMIC
#undef HOST_CUDA_ATOMIC_CHOICE
#undef HOST_CUDA_ATOMICS

#define HOST_CUDA_LOAD(name) \
  template <typename T>      \
  T name(const T* address) { \
    return *address;         \
  }
#define HOST_CUDA_STORE(name)      \
  template <typename T>            \
  void name(T* address, T value) { \
    *address = value;              \
  }
HOST_CUDA_LOAD(__ldg)
HOST_CUDA_LOAD(__ldca)
HOST_CUDA_LOAD(__ldcg)
HOST_CUDA_LOAD(__ldcs)
HOST_CUDA_LOAD(__ldlu)
HOST_CUDA_STORE(__stcg)
HOST_CUDA_STORE(__stcs)
HOST_CUDA_STORE(__stwb)
HOST_CUDA_STORE(__stwt)
#undef HOST_CUDA_LOAD
#undef HOST_CUDA_STORE

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }

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
