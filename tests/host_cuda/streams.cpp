// The runtime API of the stand-in: streams as queues that a seeded scheduler drains, events, memory, devices.
//
// Operations run when the host waits or queries, in any order that streams and events allow, or at the call itself, as
// the seed decides. A copy from pinned memory reads it when it runs, a copy from pageable memory at the call. cudaFree
// and cudaFreeHost do not wait: memory that an operation still needs must not be freed (CUDA's own wait hides this
// mistake; allocators on top of it do not). AddressSanitizer reports accesses of the host to device memory.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <thread>
#include <utility>

#include "cudaTypedefs.h"
#include "runtime.h"

struct CUstream_st {
  int device;
  bool blocking;
  bool destroyed = false;
  host_cuda::Operation* last = nullptr;
  CUgraph_st* capture = nullptr;
};
struct CUevent_st {
  int device;
  bool destroyed = false, captured = false;
  host_cuda::Operation* record = nullptr;
};
struct CUgraph_st {
  struct Node {
    const char* what;
    std::function<void(host_cuda::Operation&)> run;
  };
  std::vector<Node> nodes;  // in order
};

namespace host_cuda {

Runtime::Runtime() {
  const char* value = std::getenv("HOST_CUDA_SEED");
  seed(value ? std::strtoull(value, nullptr, 0) : 0);
}

Runtime& runtime() {
  static Runtime* const instance = [] {
    const Quiet quiet;
    return new Runtime;
  }();
  return *instance;
}

Options& options() { return runtime().options; }

Calls& calls() {
  thread_local Calls of_thread;
  return of_thread;
}

u64 random_below(u64 end) {  // splitmix64
  u64 z = runtime().random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return (z ^ z >> 31) % end;
}

void fail(const char* format, ...) {
  const Runtime& r = runtime();
  std::fprintf(stderr, "host_cuda: ");
  if (r.kernel) {
    char name[512] = "?";
    if (__sanitizer_symbolize_pc)
      // The symbolizer expects a return address and looks up the instruction before it.
      __sanitizer_symbolize_pc(const_cast<char*>(static_cast<const char*>(r.kernel->function)) + 1, "%f", name,
                               sizeof name);
    std::fprintf(stderr, "kernel %s, ", name);
    if (r.thread)
      std::fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
                   threadIdx.y, threadIdx.z);
  } else if (r.running) {
    std::fprintf(stderr, "%s: ", r.running->what);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(nullptr);
  syscall(SYS_exit_group, 70);  // without the sanitizers' exit handlers
  __builtin_unreachable();
}

namespace {

constexpr std::size_t kSharedBytes = 48 << 10, kSharedBytesOptin = 227 << 10, kParameterBytes = 4096;

thread_local int current_device = 0;
thread_local bool has_context = false;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

// Lets one host thread at a time into the runtime. ThreadSanitizer does not see this lock, because programs must not
// rely on the order of CUDA's own locks.
class Entry {
 public:
  Entry() {
    Runtime& r = runtime();
    while (__atomic_exchange_n(&r.locked, 1, __ATOMIC_ACQUIRE)) {
      if (pthread_equal(r.owner, pthread_self())) fail("a call of the CUDA API by a kernel or a host function");
      usleep(10);
    }
    r.owner = pthread_self();
  }
  ~Entry() {
    runtime().owner = {};
    __atomic_store_n(&runtime().locked, 0, __ATOMIC_RELEASE);
  }

 private:
  Quiet quiet_;
};

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool must_fail() {
  int& countdown = calls().until_failure;
  return countdown > 0 && --countdown == 0;
}

void use_device() {
  has_context = true;
  calls().devices |= u64{1} << current_device;
}

// While a thread captures, no other thread may make a call that can wait, unless its own mode is relaxed.
void refuse_captures(const char* call) {
  if (capture_mode == cudaStreamCaptureModeRelaxed) return;
  for (const CUstream_st* stream : runtime().streams)
    if (stream->capture) fail("a call that %s while a stream is captured", call);
}

// One of these begins each function that tests can make fail. ENTER also makes a context on the current device if the
// thread has none.
#define ENTER_WITHOUT_CONTEXT \
  const Entry entry_;         \
  if (must_fail()) return result(cudaErrorUnknown)
#define ENTER            \
  ENTER_WITHOUT_CONTEXT; \
  use_device()

// --- The scheduler

// Makes device memory accessible while operations run.
class DeviceMemoryOpen {
 public:
  DeviceMemoryOpen() { each(__asan_unpoison_memory_region); }
  ~DeviceMemoryOpen() { each(__asan_poison_memory_region); }

 private:
  static void each(void (*change)(const volatile void*, std::size_t)) {
    if (!change) return;
    for (const auto& [address, allocation] : runtime().memory)
      if (allocation.type == cudaMemoryTypeDevice) change(reinterpret_cast<void*>(address), allocation.bytes);
  }
};

// A thread instead of a signal: ThreadSanitizer delays signals in a loop that makes no calls.
void watch() {
  const volatile Runtime& r = runtime();
  const volatile Operation* watched = nullptr;
  for (int tenths = 0;; ++tenths) {
    usleep(100000);
    if (!r.running || watched != r.running) tenths = 0;
    watched = r.running;
    const int limit = r.options.watchdog_seconds;
    if (limit && tenths > 10 * limit) fail("the watchdog ends an operation that takes longer than %d s", limit);
  }
}

void execute(Operation& operation) {
  static const bool watched = [] {
    std::thread(watch).detach();
    return true;
  }();
  static_cast<void>(watched);
  Runtime& r = runtime();
  void* const host = under_tsan() ? __tsan_get_current_fiber() : nullptr;
  r.running = &operation;
  become(operation.identity);
  acquire(&operation.enqueued);
  for (const Operation* before : operation.after) acquire(&before->finished);
  if (operation.run) operation.run(operation);
  release(&operation.finished);
  become(host);
  r.running = nullptr;
  operation.done = true;
  operation.run = nullptr;
  operation.after.clear();
  r.pending.erase(std::find(r.pending.begin(), r.pending.end(), &operation));
}

bool is_ready(const Operation* operation) {
  return std::all_of(operation->after.begin(), operation->after.end(), [](const Operation* o) { return o->done; });
}

// Runs one of the runnable operations (only_needed: of the needed ones); false if there is none.
bool run_one(bool only_needed) {
  std::vector<Operation*> ready;
  for (Operation* operation : runtime().pending)
    if ((operation->needed || !only_needed) && is_ready(operation)) ready.push_back(operation);
  if (ready.empty()) return false;
  execute(*take_random(ready));
  return true;
}

void mark_needed(Operation* operation) {
  if (operation->done || operation->needed) return;
  operation->needed = true;
  for (Operation* before : operation->after) mark_needed(before);
}

void run_until_done(Operation* operation) {
  const DeviceMemoryOpen open;
  mark_needed(operation);
  while (!operation->done) run_one(runtime().policy == Policy::kLazy);
}

// The host waits for `operation`, if it is not null.
void wait(Operation* operation) {
  refuse_captures("waits");
  if (!operation) return;
  if (!operation->done) {
    ++calls().waits;
    run_until_done(operation);
  }
  acquire(&operation->finished);
}

// Runs what the device may do while the host makes a call.
void let_time_pass() {
  Runtime& r = runtime();
  if (r.pending.empty() || r.policy == Policy::kLazy) return;
  const DeviceMemoryOpen open;
  for (u64 steps = r.policy == Policy::kEager ? ~u64{0} : random_below(3); steps > 0 && run_one(false);) --steps;
}

cudaError_t query(Operation* operation) {
  refuse_captures("asks");
  let_time_pass();
  if (!operation) return cudaSuccess;
  // At some point, so that a polling loop ends.
  if (!operation->done && random_below(runtime().policy == Policy::kLazy ? 256 : 8) == 0) run_until_done(operation);
  if (!operation->done) return result(cudaErrorNotReady);
  acquire(&operation->finished);
  return cudaSuccess;
}

CUstream_st& legacy_stream(int device) {
  auto& streams = runtime().legacy_streams;
  while (static_cast<int>(streams.size()) <= device)
    streams.push_back(std::make_unique<CUstream_st>(CUstream_st{static_cast<int>(streams.size()), true}));
  return *streams[static_cast<std::size_t>(device)];
}

CUstream_st& stream_of(cudaStream_t stream) {
  if (!stream || stream == cudaStreamLegacy) return legacy_stream(current_device);
  if (!runtime().streams.count(stream)) fail("%p is no stream", static_cast<void*>(stream));
  if (stream->destroyed) fail("a stream is used that has been destroyed");
  return *stream;
}

CUevent_st& event_of(cudaEvent_t event) {
  if (!runtime().events.count(event)) fail("%p is no event", static_cast<void*>(event));
  if (event->destroyed) fail("an event is used that has been destroyed");
  return *event;
}

// The operations that the next operation on `stream` must follow.
std::vector<Operation*> last_of(const CUstream_st& stream) {
  std::vector<Operation*> last{stream.last};
  const CUstream_st& legacy = legacy_stream(stream.device);
  if (&stream != &legacy) {
    if (stream.blocking) last.push_back(legacy.last);
  } else {
    for (const CUstream_st* other : runtime().streams)
      if (other->blocking && other->device == stream.device) last.push_back(other->last);
  }
  last.erase(std::remove(last.begin(), last.end(), nullptr), last.end());
  return last;
}

// Returns null while the stream is captured: the operation only becomes a node.
Operation* enqueue(const char* what, CUstream_st& stream, std::function<void(Operation&)> run,
                   Operation* also_after = nullptr) {
  Runtime& r = runtime();
  if (stream.capture) {
    if (also_after) fail("%s: a captured stream that waits for another is not modelled", what);
    stream.capture->nodes.push_back({what, std::move(run)});
    return nullptr;
  }
  while (r.identities.size() < (under_tsan() ? 16 : 1)) r.identities.push_back(new_identity());
  Operation& operation = r.operations.emplace_back();
  operation.what = what;
  operation.after = last_of(stream);
  if (also_after) operation.after.push_back(also_after);
  operation.run = std::move(run);
  operation.identity = r.identities[random_below(r.identities.size())];
  release(&operation.enqueued);
  r.pending.push_back(&operation);
  stream.last = &operation;
  let_time_pass();
  return &operation;
}

// --- Memory

const Allocation* allocation_of(const void* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto next = runtime().memory.upper_bound(address);
  if (next == runtime().memory.begin()) return nullptr;
  const auto& [begin, allocation] = *std::prev(next);
  return address < begin + allocation.bytes ? &allocation : nullptr;
}

cudaMemoryType type_of(const void* pointer, std::size_t bytes) {
  const Allocation* allocation = allocation_of(pointer);
  if (!allocation) return cudaMemoryTypeUnregistered;
  if (bytes && allocation_of(static_cast<const char*>(pointer) + bytes - 1) != allocation)
    fail("%zu bytes at %p run past the end of their allocation", bytes, pointer);
  return allocation->type;
}

Operation* copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream_handle) {
  CUstream_st& stream = stream_of(stream_handle);
  ++calls().copies;
  const cudaMemoryType to_type = type_of(to, bytes), from_type = type_of(from, bytes);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault && bytes &&
      ((to_type == cudaMemoryTypeDevice) != to_device || (from_type == cudaMemoryTypeDevice) != from_device))
    fail("a copy from %p to %p, one of which is not on the side that its kind says", from, to);
  std::function<void(Operation&)> run = [=](Operation&) { std::memcpy(to, from, bytes); };
  if (from_type == cudaMemoryTypeUnregistered) {
    std::shared_ptr<char> staged(static_cast<char*>(std::malloc(bytes + 1)), std::free);
    if (under_tsan()) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);  // report this read: it is the caller's
    std::memcpy(staged.get(), from, bytes);
    if (under_tsan()) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    run = [=](Operation&) { std::memcpy(to, staged.get(), bytes); };
  }
  Operation* operation = enqueue("cudaMemcpyAsync", stream, std::move(run));
  if (to_type == cudaMemoryTypeUnregistered) wait(operation);
  return operation;
}

cudaError_t allocate(void** pointer, std::size_t bytes, cudaMemoryType type) {
  refuse_captures("allocates");
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(pointer, 256, bytes)) return result(cudaErrorMemoryAllocation);
  // Vary the value, because wrong code can be right by chance with one value.
  const int poisons[] = {0x00, 0xCD, 0xFF};
  std::memset(*pointer, poisons[random_below(3)], bytes);
  runtime().memory[reinterpret_cast<std::uintptr_t>(*pointer)] = {bytes, type, false};
  if (type == cudaMemoryTypeDevice && __asan_poison_memory_region) __asan_poison_memory_region(*pointer, bytes);
  return cudaSuccess;
}

cudaError_t deallocate(void* pointer, cudaMemoryType type) {
  if (!pointer) return cudaSuccess;
  refuse_captures("frees");
  const auto found = runtime().memory.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == runtime().memory.end() || found->second.type != type || found->second.registered)
    fail("%p is freed twice, or not by the function that belongs to its allocation", pointer);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(pointer, found->second.bytes);
  runtime().memory.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

bool is_device(int device) { return device >= 0 && device < options().devices; }

}  // namespace

bool is_device_accessible(const void* pointer, std::size_t bytes) {
  return type_of(pointer, bytes) != cudaMemoryTypeUnregistered;
}

void seed(u64 value) {
  const Entry entry;
  runtime().seed(value);
}

cudaError_t launch(const Kernel& kernel, cudaStream_t stream_handle, std::function<void()> call_one_thread,
                   std::initializer_list<const void*> pointer_parameters) {
  ENTER;
  CUstream_st& stream = stream_of(stream_handle);
  if (stream.device != current_device) return result(cudaErrorInvalidResourceHandle);
  const dim3 &grid = kernel.grid, &block = kernel.block;
  // Zero wraps around.
  if (grid.x - 1 >= 0x7FFFFFFF || grid.y - 1 >= 65535 || grid.z - 1 >= 65535 || block.x - 1 >= 1024 ||
      block.y - 1 >= 1024 || block.z - 1 >= 64 || static_cast<u64>(block.x) * block.y * block.z > 1024)
    return result(cudaErrorInvalidConfiguration);
  const auto optin = runtime().shared_bytes_optin.find({kernel.function, current_device});
  if (kernel.shared_bytes > (optin == runtime().shared_bytes_optin.end() ? kSharedBytes : optin->second) ||
      kernel.parameter_bytes > kParameterBytes)
    return result(cudaErrorInvalidValue);
  for (const void* pointer : pointer_parameters)
    if (pointer && type_of(pointer, 1) == cudaMemoryTypeUnregistered)
      fail("a kernel is given %p, which is neither device nor pinned memory", pointer);
  if (runtime().loaded.insert({kernel.function, current_device}).second) ++calls().delays;
  ++calls().launches;
  calls().most_blocks = std::max(calls().most_blocks, static_cast<u64>(grid.x) * grid.y * grid.z);
  enqueue("kernel", stream,
          [kernel, call = std::move(call_one_thread)](Operation& operation) { run_kernel(kernel, call, operation); });
  return cudaSuccess;
}

}  // namespace host_cuda

using namespace host_cuda;

// --- Devices

cudaError_t cudaGetDeviceCount(int* count) {
  ENTER_WITHOUT_CONTEXT;
  *count = options().devices;
  return *count ? cudaSuccess : result(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  ENTER_WITHOUT_CONTEXT;
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  const Entry entry;  // cannot be made to fail: the caller could not restore its device
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  current_device = device;
  use_device();
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  ENTER;
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  *properties = {"host_cuda",
                 std::size_t{1} << 34,
                 kSharedBytes,
                 kSharedBytesOptin,
                 options().compute_capability / 10,
                 options().compute_capability % 10,
                 options().multiprocessors,
                 2048,
                 32,
                 1 << 20};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ENTER_WITHOUT_CONTEXT;
  if (!is_device(device)) return result(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount ? options().multiprocessors : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  ENTER;
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER;
  for (const CUstream_st* stream : runtime().streams)
    if (stream->device == current_device) wait(stream->last);
  wait(legacy_stream(current_device).last);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const Entry entry;  // cannot be made to fail, because CUDA's fails only for invalid arguments
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

#define HOST_CUDA_NAME(name, value) \
  case name:                        \
    return #name;
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) { HOST_CUDA_ERRORS(HOST_CUDA_NAME) }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// --- Memory

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  ENTER;
  return allocate(pointer, bytes, cudaMemoryTypeDevice);
}
cudaError_t cudaFree(void* pointer) {
  ENTER;
  return deallocate(pointer, cudaMemoryTypeDevice);
}
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  ENTER;
  ++calls().delays;
  return allocate(pointer, bytes, cudaMemoryTypeHost);
}
cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
cudaError_t cudaFreeHost(void* pointer) {
  ENTER;
  return deallocate(pointer, cudaMemoryTypeHost);
}
cudaError_t cudaHostRegister(void* pointer, std::size_t bytes, unsigned) {
  ENTER;
  if (!pointer || bytes == 0) return result(cudaErrorInvalidValue);
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto next = runtime().memory.lower_bound(address);
  if (allocation_of(pointer) || (next != runtime().memory.end() && next->first < address + bytes))
    return result(cudaErrorHostMemoryAlreadyRegistered);
  runtime().memory[address] = {bytes, cudaMemoryTypeHost, true};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  ENTER;
  const auto found = runtime().memory.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == runtime().memory.end() || !found->second.registered) return result(cudaErrorHostMemoryNotRegistered);
  runtime().memory.erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned) {
  ENTER;
  if (type_of(host_pointer, 1) != cudaMemoryTypeHost) return result(cudaErrorInvalidValue);
  *device_pointer = host_pointer;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  ENTER;
  attributes->type = type_of(pointer, 0);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER;
  if (stream_of(stream).capture && !(is_device_accessible(to, bytes) && is_device_accessible(from, bytes)))
    return result(cudaErrorStreamCaptureUnsupported);
  copy(to, from, bytes, kind, stream);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  ENTER;
  if (type_of(to, bytes) == cudaMemoryTypeUnregistered) fail("cudaMemsetAsync of %p, which is host memory", to);
  enqueue("cudaMemsetAsync", stream_of(stream), [=](Operation&) { std::memset(to, value, bytes); });
  return cudaSuccess;
}

// Copies in any order. Sources are read in stream order or, if that is allowed, at the call.
static CUresult memcpy_batch(CUdeviceptr* to, CUdeviceptr* from, std::size_t* sizes, std::size_t count,
                             CUmemcpyAttributes* attributes, std::size_t* first_of_attributes,
                             std::size_t num_attributes, std::size_t*, CUstream stream) {
  const Entry entry;
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (options().batch_copies == 2) return CUDA_ERROR_NOT_SUPPORTED;
  if (must_fail() || !stream || stream == cudaStreamLegacy || count == 0 || num_attributes != 1 ||
      *first_of_attributes != 0 || attributes->srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_INVALID)
    return CUDA_ERROR_INVALID_VALUE;
  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
  };
  ++calls().copies;
  std::vector<Copy> copies;
  for (std::size_t i = 0; i < count; ++i) {
    copies.push_back({reinterpret_cast<void*>(to[i]), reinterpret_cast<const void*>(from[i]), sizes[i]});
    if (type_of(copies[i].to, sizes[i]) == cudaMemoryTypeUnregistered ||
        type_of(copies[i].from, sizes[i]) == cudaMemoryTypeUnregistered)
      fail("cuMemcpyBatchAsync between %p and %p, one of which is pageable", copies[i].from, copies[i].to);
  }
  const auto run = [copies](Operation&) mutable {
    while (!copies.empty()) {
      const Copy one = take_random(copies);
      std::memcpy(one.to, one.from, one.bytes);
    }
  };
  if (attributes->srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM) {
    enqueue("cuMemcpyBatchAsync", stream_of(stream), run);
  } else {
    std::vector<char> early;
    const DeviceMemoryOpen open;
    for (const Copy& one : copies)
      early.insert(early.end(), static_cast<const char*>(one.from), static_cast<const char*>(one.from) + one.bytes);
    enqueue("cuMemcpyBatchAsync", stream_of(stream), [copies, early](Operation&) {
      std::size_t at = 0;
      for (const Copy& one : copies) {
        std::memcpy(one.to, early.data() + at, one.bytes);
        at += one.bytes;
      }
    });
  }
  return CUDA_SUCCESS;
}
static CUresult current_context(CUcontext* context) {
  *context = has_context ? reinterpret_cast<CUcontext>(&runtime()) : nullptr;
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  ENTER_WITHOUT_CONTEXT;
  *function = nullptr;
  if (std::strcmp(symbol, "cuMemcpyBatchAsync") == 0 && version == 12080 && options().batch_copies)
    *function = reinterpret_cast<void*>(memcpy_batch);
  if (std::strcmp(symbol, "cuCtxGetCurrent") == 0) *function = reinterpret_cast<void*>(current_context);
  *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- Streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  ENTER;
  *stream = new CUstream_st{current_device, (flags & cudaStreamNonBlocking) == 0};
  runtime().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  ENTER;
  if (!stream) return result(cudaErrorInvalidResourceHandle);
  stream_of(stream).destroyed = true;  // its pending operations still run
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER;
  if (stream_of(stream).capture) return result(cudaErrorStreamCaptureUnsupported);
  for (Operation* operation : last_of(stream_of(stream))) wait(operation);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  ENTER;
  if (stream_of(stream).capture) return result(cudaErrorStreamCaptureUnsupported);
  for (Operation* operation : last_of(stream_of(stream)))
    if (query(operation) != cudaSuccess) return cudaErrorNotReady;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  ENTER;
  if (event_of(event).captured) fail("a stream waits for an event that was recorded in a capture: not modelled");
  Operation* record = event->record;
  if (record) enqueue("cudaStreamWaitEvent", stream_of(stream), nullptr, record);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  ENTER;
  enqueue("cudaLaunchHostFunc", stream_of(stream), [=](Operation&) { function(data); });
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  ENTER;
  if (!stream || stream == cudaStreamLegacy) return result(cudaErrorStreamCaptureUnsupported);
  stream_of(stream).capture = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  ENTER;
  *graph = std::exchange(stream_of(stream).capture, nullptr);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  ENTER;
  *status = stream_of(stream).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  ENTER;
  *executable = new CUgraph_st(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  ENTER;
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaGraphDestroy(executable); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ENTER;
  for (const CUgraph_st::Node& node : executable->nodes) enqueue(node.what, stream_of(stream), node.run);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ENTER;
  *event = new CUevent_st{current_device};
  runtime().events.insert(*event);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  ENTER;
  event_of(event).destroyed = true;  // existing waits for it remain
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream_handle) {
  ENTER;
  CUstream_st& stream = stream_of(stream_handle);
  if (event_of(event).device != stream.device) return result(cudaErrorInvalidResourceHandle);
  event->captured = stream.capture != nullptr;
  event->record = enqueue("cudaEventRecord", stream, nullptr);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER;
  if (event_of(event).captured) return result(cudaErrorCapturedEvent);
  return query(event_of(event).record);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER;
  if (event_of(event).captured) return result(cudaErrorCapturedEvent);
  wait(event_of(event).record);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ENTER;
  const auto bytes = static_cast<std::size_t>(value);
  if (bytes > kSharedBytesOptin) return result(cudaErrorInvalidValue);
  runtime().shared_bytes_optin[{kernel, current_device}] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ENTER;
  runtime().loaded.insert({kernel, current_device});
  attributes->ptxVersion = options().compute_capability;
  return cudaSuccess;
}
