// BLAKE3 compressions in vectors of LMC_LANES 32-bit lanes, a compression a lane, by GCC's and Clang's vector types.
// The build compiles this file for every instruction set, into namespace LMC_SIMD each, with its own flags; so it calls
// no function that another file has too, lest the linker keep the copy that the machine cannot run.
#include "hash_many.h"

#include <utility>

#include "blake3.h"

namespace lmc::LMC_SIMD {
namespace {

constexpr int kLanes = LMC_LANES;
constexpr int kWords = blake3::kBlockWords;

typedef u32 Vector __attribute__((vector_size(4 * kLanes)));
typedef u32 UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef u8 Bytes __attribute__((vector_size(4 * kLanes)));

constexpr u8 kSchedule[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13}};

#define LMC_INLINE inline __attribute__((always_inline))

LMC_INLINE Vector broadcast(u32 word) { return Vector{} + word; }

// Rotations by whole bytes are one shuffle where bytes can be shuffled, by other amounts two shifts.
template <int kBits, std::size_t... kByte>
LMC_INLINE Vector rotate_bytes(Vector v, std::index_sequence<kByte...>) {
  return (Vector)__builtin_shufflevector((Bytes)v, (Bytes)v, (kByte / 4 * 4 + (kByte + kBits / 8) % 4)...);
}

template <int kBits>
LMC_INLINE Vector rotate(Vector v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (kBits % 8 == 0) return rotate_bytes<kBits>(v, std::make_index_sequence<4 * kLanes>());
#endif
  return (v >> kBits) | (v << (32 - kBits));
}

LMC_INLINE void mix(Vector& a, Vector& b, Vector& c, Vector& d, Vector x, Vector y) {
  a += b + x;
  d = rotate<16>(d ^ a);
  c += d;
  b = rotate<12>(b ^ c);
  a += b + y;
  d = rotate<8>(d ^ a);
  c += d;
  b = rotate<7>(b ^ c);
}

struct State {
  Vector v[16];
};

LMC_INLINE void rounds(State& state, const Vector cv[8], const Vector m[16], Vector counter_low, Vector counter_high,
                       Vector block_bytes, Vector flags) {
  Vector* v = state.v;
  for (int i = 0; i < 8; ++i) v[i] = cv[i];
  v[8] = broadcast(blake3::kIv0), v[9] = broadcast(blake3::kIv1);
  v[10] = broadcast(blake3::kIv2), v[11] = broadcast(blake3::kIv3);
  v[12] = counter_low, v[13] = counter_high, v[14] = block_bytes, v[15] = flags;
  LMC_UNROLL
  for (int round = 0; round < 7; ++round) {
    const u8* s = kSchedule[round];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
}

// Exchanges the off-diagonal blocks of kStep x kStep in rows kStep apart.
template <int kStep, std::size_t... kLane>
LMC_INLINE void exchange(Vector& a, Vector& b, std::index_sequence<kLane...>) {
  const Vector low = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  const Vector high = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
  a = low, b = high;
}

template <int kStep>
LMC_INLINE void exchange_all(Vector rows[kLanes]) {
  LMC_UNROLL
  for (int i = 0; i < kLanes; ++i)
    if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes>());
}

LMC_INLINE void transpose(Vector rows[kLanes]) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if constexpr (kLanes > 4) exchange_all<4 % kLanes>(rows);
  if constexpr (kLanes > 8) exchange_all<8 % kLanes>(rows);
}

// Word w of lane i of `out` is word w of from[i]. kCount: 8 or 16 words.
template <int kCount>
LMC_INLINE void load(Vector out[kCount], const u32* const from[kLanes]) {
  if constexpr (kCount >= kLanes) {
    LMC_UNROLL
    for (int part = 0; part < kCount; part += kLanes) {
      LMC_UNROLL
      for (int i = 0; i < kLanes; ++i) out[part + i] = *(const UnalignedVector*)(from[i] + part);
      transpose(out + part);
    }
  } else {
    for (int w = 0; w < kCount; ++w)
      for (int i = 0; i < kLanes; ++i) out[w][i] = from[i][w];
  }
}

template <int kCount>
LMC_INLINE void store(const Vector values[kCount], u32* const to[kLanes], u32 count) {
  if constexpr (kCount >= kLanes) {
    LMC_UNROLL
    for (int part = 0; part < kCount; part += kLanes) {
      Vector rows[kLanes];
      LMC_UNROLL
      for (int i = 0; i < kLanes; ++i) rows[i] = values[part + i];
      transpose(rows);
      for (u32 i = 0; i < count; ++i) *(UnalignedVector*)(to[i] + part) = rows[i];
    }
  } else {
    for (u32 i = 0; i < count; ++i)
      for (int w = 0; w < kCount; ++w) to[i][w] = values[w][i];
  }
}

void leaves(const u64* words, u32 count, const u32 key[8], u32 flags, u64 first_leaf, u32 (*running)[8],
            u32 (*cvs)[8]) {
  Vector cv[8], low, high;
  for (int w = 0; w < 8; ++w) cv[w] = broadcast(key[w]);
  for (int i = 0; i < kLanes; ++i) {
    low[i] = static_cast<u32>(first_leaf + i);
    high[i] = static_cast<u32>((first_leaf + i) >> 32);
  }
  for (u32 b = 0; b < blake3::kLeafBlocks; ++b) {
    const u32* from[kLanes];
    for (u32 i = 0; i < kLanes; ++i)  // lanes without a leaf repeat the first
      from[i] = reinterpret_cast<const u32*>(words + 128 * (i < count ? i : 0)) + kWords * b;
    Vector m[kWords];
    load<kWords>(m, from);
    State state;
    const u32 block_flags =
        flags | (b == 0 ? blake3::kLeafStart : 0) | (b + 1 == blake3::kLeafBlocks ? blake3::kLeafEnd : 0);
    rounds(state, cv, m, low, high, broadcast(blake3::kBlockBytes), broadcast(block_flags));
    for (int w = 0; w < 8; ++w) cv[w] = state.v[w] ^ state.v[w + 8];
    const bool last = b + 1 == blake3::kLeafBlocks;
    if (!last && !running) continue;
    u32* to[kLanes];
    for (u32 i = 0; i < kLanes; ++i) to[i] = last ? cvs[i] : running[b * kLanes + i];
    store<8>(cv, to, count);
  }
}

void compress(const Compression* compressions, u64 count) {
  for (u64 first = 0; first < count; first += kLanes) {
    const u32 here = count - first < kLanes ? static_cast<u32>(count - first) : kLanes;
    const u32 *cvs[kLanes], *blocks[kLanes];
    u32* outs[kLanes];
    Vector low, high, block_bytes, flags;
    for (u32 i = 0; i < kLanes; ++i) {
      const Compression& one = compressions[first + (i < here ? i : 0)];
      cvs[i] = one.cv, blocks[i] = one.block, outs[i] = one.out;
      low[i] = static_cast<u32>(one.counter), high[i] = static_cast<u32>(one.counter >> 32);
      block_bytes[i] = one.block_bytes, flags[i] = one.flags;
    }
    Vector cv[8], m[kWords];
    load<8>(cv, cvs);
    load<kWords>(m, blocks);
    State state;
    rounds(state, cv, m, low, high, block_bytes, flags);
    for (int w = 0; w < 8; ++w) cv[w] = state.v[w] ^ state.v[w + 8];
    store<8>(cv, outs, here);
  }
}

void add_extended_output(u64* ids, u64 count, const u32 cv[8], const u32 block[16], u32 block_bytes, u32 flags,
                         u64 first_word) {
  Vector chaining[8], m[kWords];
  for (int w = 0; w < 8; ++w) chaining[w] = broadcast(cv[w]);
  for (int w = 0; w < kWords; ++w) m[w] = broadcast(block[w]);
  alignas(64) u64 output[kLanes][8];
  u32* rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<u32*>(output[i]);
  u64 skip = first_word % 8;
  for (u64 number = first_word / 8, done = 0; done < count; number += kLanes) {
    Vector low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = static_cast<u32>(number + i);
      high[i] = static_cast<u32>((number + i) >> 32);
    }
    State state;
    rounds(state, chaining, m, low, high, broadcast(block_bytes), broadcast(flags | blake3::kRoot));
    Vector words[kWords];
    for (int w = 0; w < 8; ++w) {
      words[w] = state.v[w] ^ state.v[w + 8];
      words[w + 8] = state.v[w + 8] ^ chaining[w];
    }
    store<kWords>(words, rows, kLanes);
    const u64* from = &output[0][0] + skip;
    u64 here = 8 * kLanes - skip;
    if (here > count - done) here = count - done;
    for (u64 i = 0; i < here; ++i) ids[done + i] = (ids[done + i] + from[i]) | u64{1} << 63;
    done += here;
    skip = 0;
  }
}

#define LMC_TEXT_OF(x) #x
#define LMC_TEXT(x) LMC_TEXT_OF(x)

}  // namespace

extern const HashMany hash_many;
const HashMany hash_many{LMC_TEXT(LMC_SIMD), kLanes, leaves, compress, add_extended_output};

}  // namespace lmc::LMC_SIMD
