// Shared by the drivers in this folder: device memory, pinned memory, and error handling.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "launch.h"

#ifdef LMC_HOST_CUDA
// The mutation that is active; see test_mutations.py. Each driver is one translation unit.
int lmc_mutant = std::atoi(std::getenv("LMC_MUTANT") ? std::getenv("LMC_MUTANT") : "0");
#endif

namespace lmc {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "driver: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
#define CHECK(call) lmc::check(call, #call)

struct CudaFree {
  void operator()(void* pointer) const { CHECK(cudaFree(pointer)); }
};
struct CudaFreeHost {
  void operator()(void* pointer) const { CHECK(cudaFreeHost(pointer)); }
};
using DeviceMemory = std::unique_ptr<u8, CudaFree>;
using PinnedMemory = std::unique_ptr<u8, CudaFreeHost>;

inline DeviceMemory device_memory(u64 bytes) {
  void* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, bytes));
  return DeviceMemory(static_cast<u8*>(pointer));
}
inline PinnedMemory pinned_memory(u64 bytes) {
  void* pointer = nullptr;
  CHECK(cudaMallocHost(&pointer, bytes));
  return PinnedMemory(static_cast<u8*>(pointer));
}

}  // namespace lmc
