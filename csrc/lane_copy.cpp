// Copies with checksums in vectors of LMC_LANES 32-bit words. The build compiles this file once per instruction set,
// with that set's flags, into namespace LMC_SIMD. So it must not call inline functions that other files use too: the
// linker might keep the copy that the machine cannot run.
#include "lane_copy.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace lmc::LMC_SIMD {
namespace {

enum class To { kNowhere, kMemory, kPastCaches };

typedef u64 Word __attribute__((aligned(1), may_alias));

#define LMC_INLINE inline __attribute__((always_inline))

// Same as LaneSums::add, which must not be called here: see the file's first comment.
LMC_INLINE void add_lane(LaneSums& sums, u64 index, u64 a, u64 b) {
  const u64 x = a ^ (kLowKey + index * kLowStep), y = b ^ (kHighKey + index * kHighStep);
  sums.low += (x & 0xFFFFFFFF) * (x >> 32) + b;
  sums.high += (y & 0xFFFFFFFF) * (y >> 32) + a;
}

template <To kTo, bool kSum>
LMC_INLINE void copy_one(u8* to, const u8* from, u64 index, LaneSums& sums) {
  const Word* lane = reinterpret_cast<const Word*>(from);
  const u64 a = lane[0], b = lane[1];
  if constexpr (kTo != To::kNowhere) {
    reinterpret_cast<Word*>(to)[0] = a;
    reinterpret_cast<Word*>(to)[1] = b;
  }
  if constexpr (kSum) add_lane(sums, index, a, b);
}

#ifdef __SSE2__

constexpr u64 kVectorBytes = 4 * LMC_LANES, kVectorLanes = kVectorBytes / kLaneBytes;
typedef u64 Vector __attribute__((vector_size(kVectorBytes)));
typedef u64 UnalignedVector __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

LMC_INLINE Vector multiply_low_halves(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Vector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

LMC_INLINE Vector exchange_words(Vector v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_shuffle_epi32((__m512i)v, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
#elif defined(__AVX2__)
  return (Vector)_mm256_shuffle_epi32((__m256i)v, _MM_SHUFFLE(1, 0, 3, 2));
#else
  return (Vector)_mm_shuffle_epi32((__m128i)v, _MM_SHUFFLE(1, 0, 3, 2));
#endif
}

LMC_INLINE void stream_vector(u8* to, Vector v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#endif
}

template <To kTo, bool kSum>
void copy_lanes(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, bool far, LaneSums* all) {
  LaneSums sums;
  u64 i = 0;
  if constexpr (kTo == To::kPastCaches)  // align `to` for streaming of whole vectors
    for (; i < bytes && reinterpret_cast<std::uintptr_t>(to + i) % kVectorBytes; i += kLaneBytes)
      copy_one<kTo, kSum>(to + i, from + i, first_lane + i / kLaneBytes, sums);
  Vector key, step, total = {};
  for (u64 k = 0; k < kVectorLanes; ++k) {
    key[2 * k] = kLowKey + (first_lane + i / kLaneBytes + k) * kLowStep;
    key[2 * k + 1] = kHighKey + (first_lane + i / kLaneBytes + k) * kHighStep;
    step[2 * k] = kVectorLanes * kLowStep;
    step[2 * k + 1] = kVectorLanes * kHighStep;
  }
  const auto copy_vector = [&](u64 at) {
    const Vector v = *reinterpret_cast<const UnalignedVector*>(from + at);
    if constexpr (kTo == To::kPastCaches)
      stream_vector(to + at, v);
    else if constexpr (kTo == To::kMemory)
      *reinterpret_cast<UnalignedVector*>(to + at) = v;
    if constexpr (kSum) {
      const Vector x = v ^ key;
      total += multiply_low_halves(x, x >> 32) + exchange_words(v);
      key += step;
    }
  };
  constexpr u64 kLine = 64;
  for (; i + kLine <= bytes; i += kLine) {
    if constexpr (kTo != To::kNowhere) far ? __builtin_prefetch(ahead + i, 0, 2) : __builtin_prefetch(ahead + i);
    for (u64 k = 0; k < kLine; k += kVectorBytes) copy_vector(i + k);
  }
  for (; i < bytes; i += kLaneBytes) copy_one<kTo, kSum>(to + i, from + i, first_lane + i / kLaneBytes, sums);
  if constexpr (kSum) {
    for (u64 k = 0; k < kVectorLanes; ++k) {
      sums.low += total[2 * k];
      sums.high += total[2 * k + 1];
    }
    all->low += sums.low;
    all->high += sums.high;
  }
}

#else

template <To kTo, bool kSum>
void copy_lanes(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8*, bool, LaneSums* all) {
  if constexpr (kTo != To::kNowhere && !kSum) {
    __builtin_memcpy(to, from, bytes);
  } else {
    LaneSums sums;
    for (u64 i = 0; i < bytes; i += kLaneBytes)
      copy_one<kTo, kSum>(to + i, from + i, first_lane + i / kLaneBytes, sums);
    all->low += sums.low;
    all->high += sums.high;
  }
}

#endif

template <To kTo>
void copy(u8* to, const u8* from, u64 bytes, u64 first_lane, const u8* ahead, bool far, LaneSums* sums) {
  if (kTo == To::kPastCaches && reinterpret_cast<std::uintptr_t>(to) % kLaneBytes)
    return copy<To::kMemory>(to, from, bytes, first_lane, ahead, far, sums);
  (sums ? copy_lanes<kTo, true> : copy_lanes<kTo, false>)(to, from, bytes, first_lane, ahead, far, sums);
}

void sum(const u8* from, u64 bytes, u64 first_lane, LaneSums* sums) {
  copy_lanes<To::kNowhere, true>(nullptr, from, bytes, first_lane, nullptr, false, sums);
}

}  // namespace

extern const LaneCopy lane_copy;
const LaneCopy lane_copy{copy<To::kMemory>, copy<To::kPastCaches>, sum};

}  // namespace lmc::LMC_SIMD
