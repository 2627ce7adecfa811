// Copies of whole lanes that sum them up on the way. lane_copy.cpp is compiled once for each instruction set; host.cpp
// chooses one when it first needs it.
#pragma once

#include "checksum.h"

namespace lmc {

struct LaneCopy {
  // Copies `bytes`, a multiple of 16, and prefetches as much of `ahead`. sums: the lanes, from number first_lane on,
  // are added to; null: they are not. `stream` writes past the caches where `to` is a multiple of 16, behind which a
  // caller needs a fence before others may know of it.
  void (*copy)(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, LaneSums* sums);
  void (*stream)(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, LaneSums* sums);
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
