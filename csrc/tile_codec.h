// Tiles of the codec "split", payload version 2: bf16 numbers as a plane of bytes with mantissa and sign, a plane of
// 4-bit codes for exponents close to the tile's greatest, and a list of the few other exponents. Normative:
// docs/design.md.
//
// tile_codec.cpp is compiled once per instruction set; simd.cpp chooses one when it is first needed. warp_codec.h is
// the same for GPUs.
#pragma once

#include "launch.h"

namespace lmc {

constexpr u32 kTileNumbers = 2048;     // numbers in a whole tile
constexpr u32 kTileUnit = 32;          // a coded tile is padded with zeros to a multiple of so many numbers
constexpr u32 kMostExceptions = 36;    // per tile
constexpr u32 kWindow = 15;            // number of exponents with a code; code 0 is exponent 0, or an exception
constexpr u64 kCodedHeaderBytes = 64;  // of a coded payload
constexpr u64 kRawTileBytes = 2 * kTileNumbers;

// The head of a coded tile. After it come one byte per number, then half a byte per number.
struct TileHead {
  u8 top;    // the greatest exponent with a code; at least kWindow
  u8 count;  // of exceptions
  u16 zero;
  u16 index[kMostExceptions];  // ascending; zeros after the last
  u8 exponent[kMostExceptions];
};
static_assert(sizeof(TileHead) == 112, "a multiple of the checksum's lanes");

LMC_HOST_DEVICE constexpr u64 coded_tile_bytes(u64 numbers) {
  return sizeof(TileHead) + (numbers + kTileUnit - 1) / kTileUnit * kTileUnit * 3 / 2;
}
constexpr u64 kCodedTileBytes = coded_tile_bytes(kTileNumbers);

LMC_HOST_DEVICE constexpr u64 tiles_of(u64 raw_bytes) { return (raw_bytes + kRawTileBytes - 1) / kRawTileBytes; }

// Each plane of a payload is cut into tiles; the last tile may be shorter. raw_bytes: even.
LMC_HOST_DEVICE constexpr u64 coded_plane_bytes(u64 raw_bytes) {
  const u64 rest = raw_bytes % kRawTileBytes;
  return raw_bytes / kRawTileBytes * kCodedTileBytes + (rest ? coded_tile_bytes(rest / 2) : 0);
}

// What a gather of coded payloads returns per chunk: the checksum of its raw payload, that of its coded tiles, and not
// 0 if a tile has more exceptions than fit: then the payload is garbage.
constexpr u32 kCodedSums = 3;

struct TileCodec {
  // Codes `numbers` <= kTileNumbers. raw and coded: 64-byte aligned, with room for kRawTileBytes and kCodedTileBytes,
  // used by no other thread. False: there are more exceptions than fit, and `coded` holds garbage.
  bool (*encode)(u8* coded, u8* raw, u32 numbers);
  // Decodes any bytes to some numbers; never writes or reads out of bounds.
  void (*decode)(u8* raw, const u8* coded, u32 numbers);
};

namespace portable {
extern const TileCodec tile_codec;
}
#ifdef LMCACHE_MM_X86
namespace avx2 {
extern const TileCodec tile_codec;
}
namespace avx512 {
extern const TileCodec tile_codec;
}
#endif

}  // namespace lmc
