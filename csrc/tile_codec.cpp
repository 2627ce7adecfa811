// The codec's tiles on the host, in loops that compilers vectorize. The build compiles this file once per instruction
// set, with that set's flags, into namespace LMC_SIMD. So it must not call inline functions that other files use too:
// the linker might keep the copy that the machine cannot run.
#include "tile_codec.h"

namespace lmc::LMC_SIMD {
namespace {

typedef u16 Number __attribute__((may_alias));
typedef u16 TwoCodes __attribute__((may_alias));
typedef u64 EightFlags __attribute__((may_alias));

constexpr u32 kVector = 64;  // loops run over a multiple of so many numbers

struct Exponents {
  alignas(64) u8 values[kTileNumbers];
  alignas(64) u8 codes[kTileNumbers];
  alignas(64) u8 outside[kTileNumbers];  // 1 for an exception, else 0
};

// Codes each of `count` exponents in the window above `base`, and lists those without a code. Returns their number.
u32 code_exponents(Exponents& exponents, u32 count, u8 base, TileHead& head) {
  u8 any = 0;
  for (u32 i = 0; i < count; ++i) {
    const u8 exponent = exponents.values[i], code = static_cast<u8>(exponent - base);
    exponents.codes[i] = static_cast<u8>(code - 1) < kWindow ? code : 0;
    exponents.outside[i] = exponents.codes[i] == 0 ? (exponent != 0 ? 1 : 0) : 0;
    any |= exponents.outside[i];
  }
  u32 exceptions = 0;
  const EightFlags* flags = reinterpret_cast<const EightFlags*>(exponents.outside);
  for (u32 w = 0; any && w < count / 8; ++w)
    for (u64 left = flags[w]; left != 0; left &= left - 1, ++exceptions) {
      const u32 i = 8 * w + static_cast<u32>(__builtin_ctzll(left)) / 8;
      if (exceptions >= kMostExceptions) continue;
      head.index[exceptions] = static_cast<u16>(i);
      head.exponent[exceptions] = exponents.values[i];
    }
  for (u32 n = exceptions; n < kMostExceptions; ++n) head.index[n] = head.exponent[n] = 0;
  return exceptions;
}

bool encode(u8* __restrict coded, u8* __restrict raw, u32 numbers) {
  Exponents exponents;
  alignas(64) u8 rest[kTileNumbers];
  const u32 units = (numbers + kTileUnit - 1) / kTileUnit * kTileUnit;
  const u32 end = (numbers + kVector - 1) / kVector * kVector;
  Number* number = reinterpret_cast<Number*>(raw);
  for (u32 i = numbers; i < end; ++i) number[i] = 0;
  for (u32 i = 0; i < end; ++i) {
    exponents.values[i] = static_cast<u8>(number[i] >> 7);
    rest[i] = static_cast<u8>(number[i] << 1 | number[i] >> 15);
  }
  u8 greatest = kWindow;
  for (u32 i = 0; i < end; ++i) greatest = exponents.values[i] > greatest ? exponents.values[i] : greatest;

  // If a few numbers are much greater than the others, make those the exceptions.
  TileHead head{greatest, 0, 0, {}, {}};
  u32 exceptions;
  while ((exceptions = code_exponents(exponents, end, static_cast<u8>(head.top - kWindow), head)) > kMostExceptions)
    if (head.top-- == kWindow) return false;
  head.count = static_cast<u8>(exceptions);
  *reinterpret_cast<TileHead*>(coded) = head;
  u8* low = coded + sizeof head;
  for (u32 i = 0; i < units; ++i) low[i] = rest[i];
  u8* packed = low + units;
  const TwoCodes* pairs = reinterpret_cast<const TwoCodes*>(exponents.codes);
  for (u32 i = 0; i < units / 2; ++i) packed[i] = static_cast<u8>(pairs[i] | pairs[i] >> 4);
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
