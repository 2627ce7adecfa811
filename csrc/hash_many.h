// BLAKE3 compressions, several at once in the lanes of vectors. hash_many.cpp is compiled once for each instruction
// set; simd.cpp chooses one when it is first needed.
#pragma once

#include "launch.h"

namespace lmc {

// One of many independent compressions: the chaining value of (cv, block, counter, block_bytes, flags) goes to `out`.
struct Compression {
  const u32* cv;     // [8]
  const u32* block;  // [16]
  u32* out;          // [8], may be cv or lie in block
  u64 counter;
  u32 block_bytes;
  u32 flags;
};

struct HashMany {
  const char* name;
  u32 lanes;

  // The chaining values cvs[i] of `count` <= lanes full leaves of 128 words, that of leaf i at words + 128 i, its
  // number first_leaf + i. running[b * lanes + i], unless running is null: the chain of leaf i after its block b < 15.
  void (*leaves)(const u64* words, u32 count, const u32 key[8], u32 flags, u64 first_leaf, u32 (*running)[8],
                 u32 (*cvs)[8]);

  void (*compress)(const Compression* compressions, u64 count);

  // ids[i] = 2^63 | (ids[i] + word first_word + i of the extended output of the root node (cv, block, block_bytes,
  // flags)), for i in [0, count).
  void (*add_extended_output)(u64* ids, u64 count, const u32 cv[8], const u32 block[16], u32 block_bytes, u32 flags,
                              u64 first_word);
};

namespace portable {
extern const HashMany hash_many;
}
#ifdef LMCACHE_MM_X86
namespace avx2 {
extern const HashMany hash_many;
}
namespace avx512 {
extern const HashMany hash_many;
}
#endif

}  // namespace lmc
