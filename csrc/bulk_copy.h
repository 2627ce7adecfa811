// Copies into shared memory by Hopper's bulk copy engine: no thread and no register waits for the bytes.
//
// A barrier's phases complete one after the other, each when the copy that was begun in it has arrived. PTX ISA,
// data movement and conversion instructions (cp.async.bulk) and mbarrier.
#pragma once

#include "launch.h"

namespace lmc {

struct BulkBarrier {
  unsigned long long state;

#ifdef __CUDA_ARCH__
  __device__ __forceinline__ u32 address() { return static_cast<u32>(__cvta_generic_to_shared(&state)); }
#endif

  // By one thread, before a block-wide barrier and any other use.
  __device__ void init() {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_init(&state);
#endif
  }

  // By one thread: begins a phase and its copy. `to`: shared memory; `from`: global or mapped host memory; both and
  // `bytes` multiples of 16.
  __device__ void begin_copy(void* to, const void* from, u32 bytes) {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<u32>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address())
                 : "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_begin_copy(&state, to, from, bytes);
#endif
  }

  // Returns when phase number `phase`, counted from 0, is complete, and its copy visible. All phases before it are
  // complete, and the one after it is not.
  __device__ void wait(u32 phase) {
#ifdef __CUDA_ARCH__
    u32 complete = 0;
    while (!complete)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(complete)
          : "r"(address()), "r"(phase & 1)
          : "memory");
#elif defined(LMC_HOST_CUDA)
    host_cuda::mbarrier_wait(&state, phase & 1);
#endif
  }
};

}  // namespace lmc
