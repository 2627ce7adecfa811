// Shared by the two halves of the stand-in: kernels.cpp runs a grid, streams.cpp decides when.
//
// Both are compiled without ThreadSanitizer, so that the runtime itself orders nothing: acquire and release below tell
// ThreadSanitizer what CUDA orders, and nothing else.
//   a call that enqueues       before the operation
//   an operation               before its successors: the next of its stream, those after an event, and the host when
//                              it has waited for the operation
//   an operation's start       before its kernel's threads, and these before its end
//   __syncthreads, __syncwarp  all arrivals before all departures; shuffles order nothing
#pragma once

#include <pthread.h>

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "cuda_runtime.h"

#define HOST_CUDA_WEAK __attribute__((weak))
extern "C" {
HOST_CUDA_WEAK void* __tsan_get_current_fiber();
HOST_CUDA_WEAK void* __tsan_create_fiber(unsigned flags);
HOST_CUDA_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
HOST_CUDA_WEAK void __tsan_acquire(void* address);
HOST_CUDA_WEAK void __tsan_release(void* address);
HOST_CUDA_WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
HOST_CUDA_WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
HOST_CUDA_WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
HOST_CUDA_WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
HOST_CUDA_WEAK void __asan_poison_memory_region(const volatile void* address, std::size_t bytes);
HOST_CUDA_WEAK void __asan_unpoison_memory_region(const volatile void* address, std::size_t bytes);
HOST_CUDA_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t bytes);
HOST_CUDA_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* bytes);
HOST_CUDA_WEAK void __sanitizer_symbolize_pc(void* pc, const char* format, char* out, std::size_t out_bytes);
}

namespace host_cuda {

using u64 = std::uint64_t;

inline bool under_tsan() { return __tsan_create_fiber != nullptr; }

inline void acquire(const void* token) {
  if (under_tsan()) __tsan_acquire(const_cast<void*>(token));
}
inline void release(const void* token) {
  if (under_tsan()) __tsan_release(const_cast<void*>(token));
}

// An identity: a fiber, which ThreadSanitizer treats as a thread.
inline void* new_identity() { return under_tsan() ? __tsan_create_fiber(0) : nullptr; }
inline void become(void* identity) {
  if (under_tsan()) __tsan_switch_to_fiber(identity, 1 /* the switch orders nothing */);
}

// While one exists, ThreadSanitizer ignores accesses and allocations: they belong to the runtime.
class Quiet {
 public:
  Quiet() {
    if (!under_tsan()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    if (!under_tsan()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// An address for acquire and release.
struct Token {
  u64 unused;
};

struct Operation {
  const char* what;
  std::vector<Operation*> after;
  std::function<void(Operation&)> run;
  void* identity;
  bool done, needed;
  Token enqueued, finished;
};

struct Allocation {
  std::size_t bytes;
  cudaMemoryType type;
  bool registered;
};

// When operations run: as late as is legal, at a random time, or at the call.
enum class Policy { kLazy, kRandom, kEager };

struct Thread;

struct Runtime {
  Options options;
  int locked = 0;
  pthread_t owner = {};

  u64 random_state = 0;
  Policy policy = Policy::kLazy;

  std::map<std::uintptr_t, Allocation> memory;
  using OnDevice = std::pair<const void*, int>;  // a kernel and a device that loads it and has its attributes
  std::map<OnDevice, std::size_t> shared_bytes_optin;
  std::set<OnDevice> loaded;
  std::set<cudaStream_t> streams;
  std::set<cudaEvent_t> events;
  std::vector<std::unique_ptr<CUstream_st>> legacy_streams;
  std::deque<Operation> operations;  // all since the start: successors also acquire finished ones
  std::vector<Operation*> pending;
  std::vector<void*> identities;  // operations draw from these

  Operation* running = nullptr;
  const Kernel* kernel = nullptr;
  Thread* thread = nullptr;
  std::vector<std::vector<Thread*>> thread_sets;

  Runtime();
  void seed(u64 value) {
    policy = static_cast<Policy>(value % 3);
    random_state = value;
    loaded.clear();
  }
};

// Never destroyed, because the library's statics may call it after main.
Runtime& runtime();

u64 random_below(u64 end);

template <typename T>
T take_random(std::vector<T>& from) {
  std::swap(from[random_below(from.size())], from.back());
  const T taken = from.back();
  from.pop_back();
  return taken;
}

// In kernels.cpp: runs all threads of all blocks as part of `operation`.
void run_kernel(const Kernel& kernel, const std::function<void()>& call_one_thread, Operation& operation);

}  // namespace host_cuda
