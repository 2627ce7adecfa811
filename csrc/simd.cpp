// The choice of an instruction set, when one is first needed.
#include "simd.h"

#include <atomic>

#include "ops.h"

namespace lmc::cpu {
namespace {

const Simd kPortable{portable::hash_many, portable::lane_copy, portable::tile_codec};
#ifdef LMCACHE_MM_X86
const Simd kAvx2{avx2::hash_many, avx2::lane_copy, avx2::tile_codec};
const Simd kAvx512{avx512::hash_many, avx512::lane_copy, avx512::tile_codec};
#endif

// The instruction sets that this machine can run, the fastest first.
std::vector<const Simd*> runnable() {
  std::vector<const Simd*> all;
#ifdef LMCACHE_MM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    all.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2")) all.push_back(&kAvx2);
#endif
  all.push_back(&kPortable);
  return all;
}

}  // namespace

std::atomic<const Simd*> chosen_simd{nullptr};

const Simd* choose_simd() {
  const Simd* one = runnable().front();
  chosen_simd.store(one, std::memory_order_relaxed);
  return one;
}

std::vector<std::string> simd_variants() {
  std::vector<std::string> names;
  for (const Simd* one : runnable()) names.push_back(one->hash_many.name);
  return names;
}

void use_simd(const std::string& name) {
  for (const Simd* one : runnable())
    if (one->hash_many.name == name) return chosen_simd.store(one, std::memory_order_relaxed);
  throw std::invalid_argument("name: expected one of simd_variants(), got " + name);
}

}  // namespace lmc::cpu
