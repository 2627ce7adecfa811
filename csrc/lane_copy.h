// Copies of whole lanes that also compute their checksum sums. lane_copy.cpp is compiled once per instruction set;
// simd.cpp chooses one when it is first needed.
#pragma once

#include "checksum.h"

namespace lmc {

struct LaneCopy {
  // Copies `bytes`, a multiple of 16, and prefetches as many bytes of `ahead`, `far` ones only as near as the L2 cache.
  // sums: the lanes, numbered from first_lane, are added to it, unless it is null. `stream` bypasses the caches if `to`
  // is a multiple of 16; then the caller needs a fence before it publishes the bytes.
  void (*copy)(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, bool far, LaneSums* sums);
  void (*stream)(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, bool far, LaneSums* sums);
  void (*sum)(const u8* from, u64 bytes, u64 first_lane, LaneSums* sums);
};

namespace portable {
extern const LaneCopy lane_copy;
}
#ifdef LMCACHE_MM_X86
namespace avx2 {
extern const LaneCopy lane_copy;
}
namespace avx512 {
extern const LaneCopy lane_copy;
}
#endif

}  // namespace lmc
