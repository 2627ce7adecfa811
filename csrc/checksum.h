// The payload checksum, version 1: a sum over 16-byte lanes, each mixed with its position. Lanes may be summed in any
// order and by any number of threads. Formula, vectors and what it detects: docs/design.md.
#pragma once

#include "launch.h"

namespace lmc {

constexpr u32 kLaneBytes = 16;

LMC_HOST_DEVICE u64 multiply_high(u64 a, u64 b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// The term of lane `index`, whose 16 bytes are the little-endian words `low` and `high`; a last lane of fewer bytes is
// filled up with zeros.
LMC_HOST_DEVICE u64 checksum_lane(u64 index, u64 low, u64 high) {
  const u64 x = low ^ (0x9E3779B97F4A7C15u + index * 0xD1B54A32D192ED03u);
  const u64 y = high ^ (0xC2B2AE3D27D4EB4Fu + index * 0x8CB92BA72F3D8DD7u);
  return (x * y) ^ multiply_high(x, y);
}

// The term of the payload's length, so that trailing zero bytes count.
LMC_HOST_DEVICE u64 checksum_length(u64 bytes) { return bytes * 0x9FB21C651E98DF25u; }

}  // namespace lmc
