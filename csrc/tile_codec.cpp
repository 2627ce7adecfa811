// The codec's tiles on the host, in loops that compilers vectorize. The build compiles this file once per instruction
// set, with that set's flags, into namespace LMC_SIMD. So it must not call inline functions that other files use too:
// the linker might keep the copy that the machine cannot run.
#include "tile_codec.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace lmc::LMC_SIMD {
namespace {

typedef u16 Number __attribute__((may_alias));
typedef u16 TwoCodes __attribute__((may_alias));

#define LMC_INLINE inline __attribute__((always_inline))

constexpr u32 kVectorBytes = 4 * LMC_LANES;
constexpr u32 kStep = 2 * kVectorBytes;  // numbers; vectors hold the bytes of half as many
static_assert(kTileNumbers % kStep == 0, "whole steps");
typedef u8 Bytes __attribute__((vector_size(kVectorBytes)));
typedef u16 Words __attribute__((vector_size(kVectorBytes)));
typedef Bytes UnalignedBytes __attribute__((aligned(1), may_alias));
typedef Words AliasedWords __attribute__((may_alias));

// The lower bytes of the words of `a`, then those of `b`. The upper bytes must be 0.
LMC_INLINE Bytes narrow(Words a, Words b) {
#if defined(__AVX512BW__)
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (Bytes)_mm512_permutexvar_epi64(order, _mm512_packus_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  return (Bytes)_mm256_permute4x64_epi64(_mm256_packus_epi16((__m256i)a, (__m256i)b), _MM_SHUFFLE(3, 1, 2, 0));
#elif defined(__SSE2__)
  return (Bytes)_mm_packus_epi16((__m128i)a, (__m128i)b);
#else
  Bytes bytes;
  for (u32 i = 0; i < kVectorBytes; ++i)
    bytes[i] = static_cast<u8>((i < kVectorBytes / 2 ? a : b)[i % (kVectorBytes / 2)]);
  return bytes;
#endif
}

// Bit i says whether byte i, 0 or 0xFF, is not 0.
LMC_INLINE u64 bits_of(Bytes bytes) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask((__m512i)bytes);
#elif defined(__AVX2__)
  return static_cast<u32>(_mm256_movemask_epi8((__m256i)bytes));
#elif defined(__SSE2__)
  return static_cast<u32>(_mm_movemask_epi8((__m128i)bytes));
#else
  u64 bits = 0;
  for (u32 i = 0; i < kVectorBytes; ++i) bits |= static_cast<u64>(bytes[i] & 1) << i;
  return bits;
#endif
}

// Codes `count` exponents in the window below `top` and lists those without a code. Returns their number; if there are
// more than kMostExceptions, it has stopped early.
u32 code_exponents(const u8* exponents, u32 count, u8 top, TileHead& head, u8* packed) {
  const u8 base = static_cast<u8>(top - kWindow);
  u32 exceptions = 0;
  for (u32 i = 0; i < count; i += kStep) {
    Words pairs[2];
    u64 outside[2];
    for (u32 half = 0; half < 2; ++half) {
      const Bytes exponent = *reinterpret_cast<const Bytes*>(exponents + i + half * kVectorBytes);
      const Bytes code = exponent - base, coded = (Bytes)(code - 1 < kWindow);
      outside[half] = bits_of(~coded & (Bytes)(exponent != 0));
      const Words both = (Words)(code & coded);
      pairs[half] = (both | both >> 4) & 0xFF;
    }
    *reinterpret_cast<UnalignedBytes*>(packed + i / 2) = narrow(pairs[0], pairs[1]);
    if ((outside[0] | outside[1]) == 0) continue;
    for (u32 half = 0; half < 2; ++half)
      for (u64 left = outside[half]; left != 0; left &= left - 1) {
        if (exceptions == kMostExceptions) return kMostExceptions + 1;
        const u32 at = i + half * kVectorBytes + static_cast<u32>(__builtin_ctzll(left));
        head.index[exceptions] = static_cast<u16>(at);
        head.exponent[exceptions++] = exponents[at];
      }
  }
  for (u32 n = exceptions; n < kMostExceptions; ++n) head.index[n] = head.exponent[n] = 0;
  return exceptions;
}

// The greatest top, from `top` downwards, that leaves few enough exceptions; 0 if there is none.
u8 lower_top(const u8* exponents, u32 count, u8 top) {
  u16 counts[256] = {};
  for (u32 i = 0; i < count; ++i) ++counts[exponents[i]];
  u32 outside = count - counts[0];
  for (u32 e = top; e > static_cast<u32>(top) - kWindow; --e) outside -= counts[e];
  while (outside > kMostExceptions) {
    if (top == kWindow) return 0;
    outside += counts[top--];
    outside -= counts[top + 1 - kWindow];
  }
  return top;
}

bool encode(u8* __restrict coded, u8* __restrict raw, u32 numbers) {
  alignas(64) u8 exponents[kTileNumbers];
  const u32 units = (numbers + kTileUnit - 1) / kTileUnit * kTileUnit;
  const u32 end = (numbers + kStep - 1) / kStep * kStep;
  Number* number = reinterpret_cast<Number*>(raw);
  for (u32 i = numbers; i < end; ++i) number[i] = 0;
  // What a last step writes past the padded numbers is overwritten, or not read.
  u8* low = coded + sizeof(TileHead);
  Bytes most = Bytes{} + static_cast<u8>(kWindow);
  for (u32 i = 0; i < end; i += kVectorBytes) {
    const AliasedWords* words = reinterpret_cast<const AliasedWords*>(raw + 2 * i);
    // Rotated by one bit, the exponent is the upper byte, and mantissa and sign are the lower one.
    const Words a = words[0] << 1 | words[0] >> 15, b = words[1] << 1 | words[1] >> 15;
    *reinterpret_cast<UnalignedBytes*>(low + i) = narrow(a & 0xFF, b & 0xFF);
    const Bytes exponent = narrow(a >> 8, b >> 8);
    *reinterpret_cast<Bytes*>(exponents + i) = exponent;
    most = most > exponent ? most : exponent;
  }
  u8 greatest = 0;
  for (u32 i = 0; i < kVectorBytes; ++i) greatest = most[i] > greatest ? most[i] : greatest;

  TileHead head;
  head.top = greatest;
  head.zero = 0;
  u32 exceptions = code_exponents(exponents, end, head.top, head, low + units);
  if (exceptions > kMostExceptions) {
    // A few numbers are much greater than the others, or the tile does not fit.
    head.top = lower_top(exponents, end, head.top);
    if (head.top == 0) return false;
    exceptions = code_exponents(exponents, end, head.top, head, low + units);
  }
  head.count = static_cast<u8>(exceptions);
  __builtin_memcpy(coded, &head, sizeof head);
  return true;
}

void decode(u8* __restrict raw, const u8* __restrict coded, u32 numbers) {
  alignas(64) u8 codes[kTileNumbers];
  TileHead head;
  __builtin_memcpy(&head, coded, sizeof head);  // read once: other processes may write to it meanwhile
  const u32 units = (numbers + kTileUnit - 1) / kTileUnit * kTileUnit;
  const u8* low = coded + sizeof head;
  const u8* packed = low + units;
  TwoCodes* pairs = reinterpret_cast<TwoCodes*>(codes);
  for (u32 i = 0; i < units / 2; ++i) pairs[i] = static_cast<u16>((packed[i] & 0x0F) | (packed[i] & 0xF0) << 4);
  const u8 base = static_cast<u8>(head.top - kWindow);
  Number* number = reinterpret_cast<Number*>(raw);
  for (u32 i = 0; i < units; ++i) {
    const u8 exponent = static_cast<u8>(codes[i] ? codes[i] + base : 0);
    number[i] = static_cast<u16>(exponent << 7 | low[i] >> 1 | low[i] << 15);
  }
  const u32 count = head.count < kMostExceptions ? head.count : kMostExceptions;
  for (u32 n = 0; n < count; ++n)
    if (head.index[n] < numbers) {
      Number& x = number[head.index[n]];
      x = static_cast<u16>((x & 0x807F) | head.exponent[n] << 7);
    }
}

}  // namespace

extern const TileCodec tile_codec;
const TileCodec tile_codec{encode, decode};

}  // namespace lmc::LMC_SIMD
