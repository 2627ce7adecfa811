// Shared by host and device code: integer names, the host/device marker, shared memory and the kernel launch.
//
// A .cu file compiles in two ways: with nvcc for a GPU, and with a C++ compiler against the stand-in for cuda_runtime.h
// in tests/host_cuda, which defines LMC_HOST_CUDA and runs whole kernels on CPU threads. This requires: no <<< >>>,
// shared memory only through shared_memory<T>(), inline PTX only under __CUDA_ARCH__ with a portable twin.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__) || defined(LMC_HOST_CUDA)
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#define LMC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LMC_HOST_DEVICE inline
#endif

#if defined(__CUDACC__) || defined(__clang__)
#define LMC_UNROLL _Pragma("unroll")
#else
#define LMC_UNROLL _Pragma("GCC unroll 16")
#endif

namespace lmc {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

#ifdef __CUDACC__

// The block's dynamic shared memory as one T, uninitialized.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(16) u8 lmc_shared_memory[];
  return *reinterpret_cast<T*>(lmc_shared_memory);
}

// Launches one kernel on `stream`. shared_bytes: sizeof(T) if the kernel uses shared_memory<T>(), else 0.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif

}  // namespace lmc
