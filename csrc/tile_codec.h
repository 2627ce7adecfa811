// Tiles of the codec "split", payload version 2: bf16 numbers as a plane of bytes with mantissa and sign, a plane of
// 4-bit exponents below the tile's greatest, and a list of the few exponents that lie outside. Normative:
// docs/design.md.
//
// tile_codec.cpp is compiled once for each instruction set; host.cpp chooses one when it first needs it.
#pragma once

#include "launch.h"

namespace lmc {

constexpr u32 kTileNumbers = 2048;     // of a whole tile
constexpr u32 kTileUnit = 32;          // numbers; a coded tile holds a multiple, the last ones being zeros
constexpr u32 kMostExceptions = 36;    // in a tile
constexpr u32 kWindow = 15;            // exponents that have a code; code 0 is exponent 0, or an exception
constexpr u64 kCodedHeaderBytes = 64;  // of a coded payload
constexpr u64 kRawTileBytes = 2 * kTileNumbers;

// What a coded tile begins with. Behind it are a byte for each number, and half a byte for each.
struct TileHead {
  u8 top;    // the greatest exponent that has a code; at least kWindow
  u8 count;  // exceptions
  u16 zero;
  u16 index[kMostExceptions];  // ascending; zeros behind the last
  u8 exponent[kMostExceptions];
};
static_assert(sizeof(TileHead) == 112, "a multiple of the checksum's lanes");

constexpr u64 coded_tile_bytes(u64 numbers) {
  return sizeof(TileHead) + (numbers + kTileUnit - 1) / kTileUnit * kTileUnit * 3 / 2;
}
constexpr u64 kCodedTileBytes = coded_tile_bytes(kTileNumbers);

constexpr u64 tiles_of(u64 raw_bytes) { return (raw_bytes + kRawTileBytes - 1) / kRawTileBytes; }

// Each plane of a payload is cut into tiles, the last of which may be shorter. raw_bytes: even.
constexpr u64 coded_plane_bytes(u64 raw_bytes) {
  const u64 rest = raw_bytes % kRawTileBytes;
  return raw_bytes / kRawTileBytes * kCodedTileBytes + (rest ? coded_tile_bytes(rest / 2) : 0);
}

struct TileCodec {
  // Codes `numbers` <= kTileNumbers. raw and coded: 64-byte aligned, room for kRawTileBytes and kCodedTileBytes, not
  // used by anybody else. False: there are more exceptions than fit, and `coded` holds garbage.
  bool (*encode)(u8* coded, u8* raw, u32 numbers);
  // Any bytes are decoded to some numbers; nothing is written or read outside.
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
