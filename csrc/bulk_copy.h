// Copies into and out of shared memory by Hopper's bulk copy engine: no thread and no register waits for the bytes.
// Addresses and lengths are multiples of 16. PTX ISA: cp.async.bulk and mbarrier.
#pragma once

#include "launch.h"

namespace lmc {

#ifdef __CUDA_ARCH__
__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
#endif

// A barrier in shared memory. Its phases complete one after another, each when `arrivals` threads have arrived and the
// copies begun in the phase are complete.
struct BulkBarrier {
  unsigned long long state;

  // Called by one thread, before a block-wide barrier and any other use.
  __device__ void init(u32 arrivals) {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_init(&state, arrivals);
#endif
  }

  // Called by a thread that arrives later: begins a copy to shared memory from global or mapped host memory.
  __device__ void load(void* to, const void* from, u32 bytes) {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&state))
                 : "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_load(&state, to, from, bytes);
#endif
  }

  __device__ void arrive() {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_arrive(&state);
#endif
  }

  // Returns when phase number `phase`, counted from 0, is complete; everything before it is then visible. All earlier
  // phases must be complete, and the one after it must not be.
  __device__ void wait(u32 phase) {
#ifdef __CUDA_ARCH__
    u32 complete = 0;
    while (!complete)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(complete)
          : "r"(shared_address(&state)), "r"(phase & 1)
          : "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_wait(&state, phase & 1);
#endif
  }
};

// Separates a thread's stores to shared memory from a later copy out of it, which another thread may begin.
__device__ inline void fence_for_bulk_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif defined(LMC_HOST_CUDA)
  host_cuda::fence_for_bulk_copies();
#endif
}

// Begins a copy from shared memory to global or mapped host memory.
__device__ inline void bulk_store(void* to, const void* from, u32 bytes) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
#elif defined(LMC_HOST_CUDA)
  host_cuda::bulk_store(to, from, bytes);
#endif
}

// Ends a group of this thread's stores.
__device__ inline void commit_bulk_stores() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#elif defined(LMC_HOST_CUDA)
  host_cuda::commit_bulk_stores();
#endif
}

// Waits until all of this thread's groups except the last kPending have read shared memory.
template <u32 kPending>
__device__ void wait_for_bulk_reads() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#elif defined(LMC_HOST_CUDA)
  host_cuda::wait_for_bulk_reads(kPending);
#endif
}

// Waits until all of this thread's groups have been written.
__device__ inline void wait_for_bulk_stores() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#elif defined(LMC_HOST_CUDA)
  host_cuda::wait_for_bulk_stores();
#endif
}

}  // namespace lmc
