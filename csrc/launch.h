// What host and device code share: integer names, the host/device marker, the kernel launch.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define LMC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LMC_HOST_DEVICE inline
#endif

#if defined(__CUDA_ARCH__) || defined(__clang__)
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

}  // namespace lmc
