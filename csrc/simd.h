// The code that is compiled once per instruction set, and the choice of one.
#pragma once

#include <atomic>

#include "hash_many.h"
#include "lane_copy.h"
#include "tile_codec.h"

namespace lmc::cpu {

struct Simd {
  const HashMany& hash_many;
  const LaneCopy& lane_copy;
  const TileCodec& tile_codec;
};

extern std::atomic<const Simd*> chosen_simd;  // by `use_simd`, or by the first `simd`
const Simd* choose_simd();

// The fastest that this machine can run, or what `use_simd` chose.
inline const Simd& simd() {
  const Simd* one = chosen_simd.load(std::memory_order_relaxed);
  return one ? *one : *choose_simd();
}

}  // namespace lmc::cpu
