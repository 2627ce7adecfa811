// The codec's tiles on a GPU: one warp codes or decodes a tile in its registers, with the bytes of tile_codec.cpp.
//
// Thread t has the lanes t + 32 v of a raw tile, so that a warp loads or stores 512 contiguous bytes at a time. A lane
// of the plane with mantissas and signs belongs to two raw lanes, one of the codes to four, all of neighboring threads:
// pairs and fours of threads transpose what they have, and every access is of whole lanes. Words hold four numbers'
// exponents or codes, one per byte.
#pragma once

#include "checksum.h"
#include "tile_codec.h"

namespace lmc::cuda {

constexpr u32 kWarp = 32;
constexpr u32 kAllLanes = 0xFFFFFFFF;
constexpr u32 kRawLanes = kRawTileBytes / kLaneBytes;  // of a whole tile
constexpr u32 kHeadLanes = sizeof(TileHead) / kLaneBytes;
constexpr u32 kThreadLanes = kRawLanes / kWarp;
constexpr u32 kEachByte = 0x01010101, kHighBits = 0x80808080;

// The sum and the maximum of the warp's values.
template <typename T>
__device__ T warp_sum(T value) {
  for (u32 step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
__device__ inline u32 warp_maximum(u32 value) {
  for (u32 step = kWarp / 2; step > 0; step /= 2) {
    const u32 other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Tells the compiler that a value changes, so that it does not keep what it has computed from it, in registers that
// there are not.
__device__ inline void forget([[maybe_unused]] u32& value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
}

// 1 in each byte that is not 0.
__device__ inline u32 nonzero_bytes(u32 word) { return (((word & ~kHighBits) + ~kHighBits) | word) >> 7 & kEachByte; }
__device__ inline u32 sum_of_bytes(u32 word) { return word * kEachByte >> 24; }

// Two numbers as four bytes, mantissa and sign, exponent, mantissa and sign, exponent; and back.
__device__ inline u32 split(u32 numbers) { return (numbers << 1 & 0xFFFEFFFE) | (numbers >> 15 & 0x00010001); }
__device__ inline u32 join(u32 bytes) { return (bytes >> 1 & 0x7FFF7FFF) | (bytes << 15 & 0x80008000); }

__device__ inline u32 codes_of(u32 exponents, u32 base) {
  const u32 bases = base * kEachByte;
  const u32 differences = ((exponents | kHighBits) - (bases & ~kHighBits)) ^ ((exponents ^ ~bases) & kHighBits);
  const u32 outside = nonzero_bytes(differences & 0xF0F0F0F0);
  return differences & 0x0F0F0F0F & ~(outside * 0x0F);
}

__device__ inline u32 exponents_of(u32 codes, u32 base) {
  const u32 bases = base * kEachByte;
  return ((codes + (bases & ~kHighBits)) ^ (bases & kHighBits)) & (nonzero_bytes(codes) * 0xFF);
}

// 1 in each byte that is the exponent of an exception.
__device__ inline u32 exceptions_of(u32 exponents, u32 codes) {
  return nonzero_bytes(exponents) - nonzero_bytes(codes);
}

__device__ inline void swap_if(bool swaps, u32& a, u32& b) {
  const u32 first = swaps ? b : a;
  b = swaps ? a : b;
  a = first;
}

// Thread t of a pair has the words w[t][0] and w[t][1], and then w[0][t] and w[1][t].
__device__ inline void transpose_pair(u32& a, u32& b) {
  const bool odd = threadIdx.x & 1;
  swap_if(odd, a, b);
  b = __shfl_xor_sync(kAllLanes, b, 1);
  swap_if(odd, a, b);
}
// The same for four threads.
__device__ inline void transpose_four(uint4& words) {
  const auto turn = [&words] {  // word i becomes word i xor t
    swap_if(threadIdx.x & 1, words.x, words.y);
    swap_if(threadIdx.x & 1, words.z, words.w);
    swap_if(threadIdx.x & 2, words.x, words.z);
    swap_if(threadIdx.x & 2, words.y, words.w);
  };
  turn();
  words.y = __shfl_xor_sync(kAllLanes, words.y, 1);
  words.z = __shfl_xor_sync(kAllLanes, words.z, 2);
  words.w = __shfl_xor_sync(kAllLanes, words.w, 3);
  turn();
}
// Which lane of its plane a thread has after the n-th transposition.
__device__ inline u32 rest_lane(u32 n) { return n * kWarp + threadIdx.x % 2 * (kWarp / 2) + threadIdx.x % kWarp / 2; }
__device__ inline u32 code_lane(u32 n) { return n * kWarp + threadIdx.x % 4 * (kWarp / 4) + threadIdx.x % kWarp / 4; }

// The sum of the values of all threads before this one, and of its own.
template <typename T>
__device__ T warp_prefix_sum(T value) {
  const u32 thread = threadIdx.x % kWarp;
  for (u32 step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_sync(kAllLanes, value, (thread - step) % kWarp);
    if (thread >= step) value += before;
  }
  return value;
}

// Shared memory of a warp.
struct CodecScratch {
  alignas(16) TileHead head;
  u32 counts[256];  // of the tile's exponents up to this one, but for 0
};

// The greatest top that leaves few enough exceptions; kWindow if none does.
__device__ inline u32 find_top(const u32 (&exponents)[kThreadLanes][2], u32 (&counts)[256]) {
  const u32 thread = threadIdx.x % kWarp;
  constexpr u32 kOwn = 256 / kWarp;
  for (u32 i = 0; i < kOwn; ++i) counts[i * kWarp + thread] = 0;
  __syncwarp();
  LMC_UNROLL
  for (u32 v = 0; v < kThreadLanes; ++v)
    for (u32 h = 0; h < 2; ++h)
      for (u32 left = exponents[v][h]; left; left >>= 8) atomicAdd(&counts[left & 0xFF], 1u);
  __syncwarp();
  u32* own = counts + thread * kOwn;
  if (thread == 0) own[0] = 0;
  for (u32 i = 1; i < kOwn; ++i) own[i] += own[i - 1];
  const u32 before = warp_prefix_sum(own[kOwn - 1]) - own[kOwn - 1];
  for (u32 i = 0; i < kOwn; ++i) own[i] += before;
  __syncwarp();
  u32 found = kWindow;
  for (u32 top = thread * kOwn; top < (thread + 1) * kOwn; ++top)
    if (top >= kWindow && counts[255] - counts[top] + counts[top - kWindow] <= kMostExceptions) found = top;
  return warp_maximum(found);
}

// Codes all exponents, eight per word. Returns the number of exceptions in the warp.
__device__ inline u32 code_exponents(u32 (&exponents)[kThreadLanes][2], u32 base, u32 (&codes)[kThreadLanes]) {
  u32 exceptions = 0;  // one sum per byte
  LMC_UNROLL
  for (u32 v = 0; v < kThreadLanes; ++v) {
    u32 of[2];
    for (u32 h = 0; h < 2; ++h) {
      forget(exponents[v][h]);
      of[h] = codes_of(exponents[v][h], base);
      exceptions += exceptions_of(exponents[v][h], of[h]);
      of[h] |= of[h] >> 4;
    }
    codes[v] = __byte_perm(of[0], of[1], 0x6420);
  }
  return warp_sum(sum_of_bytes(exceptions));
}

// Lists a tile's exceptions, at most kMostExceptions.
__device__ inline void list_exceptions(u32 (&exponents)[kThreadLanes][2], u32 base, TileHead& head) {
  u64 own = 0;  // how many there are in each of the thread's lanes, one per byte
  LMC_UNROLL
  for (u32 v = 0; v < kThreadLanes; ++v)
    for (u32 h = 0; h < 2; ++h) {
      forget(exponents[v][h]);
      own += static_cast<u64>(sum_of_bytes(exceptions_of(exponents[v][h], codes_of(exponents[v][h], base)))) << 8 * v;
    }
  const u64 until = warp_prefix_sum(own);
  // The product sums up bytes: all exceptions in lanes of a smaller v.
  const u64 first = __shfl_sync(kAllLanes, until, kWarp - 1) * 0x0101010101010100 + until - own;
  LMC_UNROLL
  for (u32 v = 0; v < kThreadLanes; ++v) {
    u32 n = first >> 8 * v & 0xFF;
    for (u32 h = 0; h < 2; ++h) {
      forget(exponents[v][h]);
      u32 left = exceptions_of(exponents[v][h], codes_of(exponents[v][h], base));
      for (u32 i = 0; left; ++i, left >>= 8)
        if (left & 1) {
          head.index[n] = static_cast<u16>(8 * (v * kWarp + threadIdx.x % kWarp) + 4 * h + i);
          head.exponent[n] = static_cast<u8>(exponents[v][h] >> 8 * i);
          ++n;
        }
    }
  }
}

// Codes the tile whose first `lanes` lanes are in `raw`, and zeros after them. Calls put(i, lane) for each lane of the
// coded tile. False: there are more exceptions than fit, and the coded tile is garbage.
template <typename Put>
__device__ bool encode_tile(const uint4 (&raw)[kThreadLanes], u32 lanes, CodecScratch& scratch, const Put& put) {
  const u32 thread = threadIdx.x % kWarp, fours = (lanes + 3) / 4;
  u32 exponents[kThreadLanes][2], greatest = 0;
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 2; ++n) {
    u32 rest[2][2];
    for (u32 i = 0; i < 2; ++i) {
      const uint4& lane = raw[2 * n + i];
      const u32 words[] = {split(lane.x), split(lane.y), split(lane.z), split(lane.w)};
      for (u32 h = 0; h < 2; ++h) {
        rest[i][h] = __byte_perm(words[2 * h], words[2 * h + 1], 0x6420);
        exponents[2 * n + i][h] = __byte_perm(words[2 * h], words[2 * h + 1], 0x7531);
      }
      for (const u32 word : words) {  // the highest byte decides
        greatest = word > greatest ? word : greatest;
        greatest = word << 16 > greatest ? word << 16 : greatest;
      }
    }
    for (u32 h = 0; h < 2; ++h) transpose_pair(rest[0][h], rest[1][h]);
    if (rest_lane(n) < 2 * fours)
      put(kHeadLanes + rest_lane(n), make_uint4(rest[0][0], rest[0][1], rest[1][0], rest[1][1]));
  }

  u32 top = warp_maximum(greatest) >> 24, codes[kThreadLanes];
  if (top < kWindow) top = kWindow;
  u32 exceptions = code_exponents(exponents, top - kWindow, codes);
  if (exceptions > kMostExceptions) {
    top = find_top(exponents, scratch.counts);
    exceptions = code_exponents(exponents, top - kWindow, codes);
  }
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 4; ++n) {
    uint4 lane = make_uint4(codes[4 * n], codes[4 * n + 1], codes[4 * n + 2], codes[4 * n + 3]);
    transpose_four(lane);
    if (code_lane(n) < fours) put(kHeadLanes + 2 * fours + code_lane(n), lane);
  }

  const bool fits = exceptions <= kMostExceptions, lists = fits && exceptions;
  uint4 of_head = make_uint4(thread == 0 ? top | exceptions << 8 : 0, 0, 0, 0);
  uint4* in_shared = reinterpret_cast<uint4*>(&scratch.head);
  if (lists) {
    if (thread < kHeadLanes) in_shared[thread] = of_head;
    __syncwarp();
    list_exceptions(exponents, top - kWindow, scratch.head);
    __syncwarp();
  }
  if (thread < kHeadLanes) {
    if (lists) of_head = in_shared[thread];
    put(thread, of_head);
  }
  return fits;
}

// Decodes a coded tile, of any bytes, into raw lanes, of which the tile has the first `lanes`; an exception's place
// after them is in lanes that nobody takes. take(i): lane i of the coded tile.
template <typename Take>
__device__ void decode_tile(uint4 (&raw)[kThreadLanes], u32 lanes, const TileHead& head, const Take& take) {
  const u32 thread = threadIdx.x % kWarp, fours = (lanes + 3) / 4;
  uint4 rest[kThreadLanes / 2], codes[kThreadLanes / 4];
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 2; ++n) {
    rest[n] = make_uint4(0, 0, 0, 0);
    if (rest_lane(n) < 2 * fours) rest[n] = take(kHeadLanes + rest_lane(n));
  }
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 4; ++n) {
    codes[n] = make_uint4(0, 0, 0, 0);
    if (code_lane(n) < fours) codes[n] = take(kHeadLanes + 2 * fours + code_lane(n));
  }
  const u32 base = (head.top - kWindow) & 0xFF, count = head.count < kMostExceptions ? head.count : kMostExceptions;
  // A thread has two of the exceptions, place and exponent.
  const u32 first = head.index[thread] | static_cast<u32>(head.exponent[thread]) << 16;
  u32 second = 0;
  if (thread + kWarp < kMostExceptions)
    second = head.index[thread + kWarp] | static_cast<u32>(head.exponent[thread + kWarp]) << 16;

  u32 exponents[kThreadLanes][2];
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 4; ++n) {
    transpose_four(codes[n]);
    const u32 of[] = {codes[n].x, codes[n].y, codes[n].z, codes[n].w};
    for (u32 i = 0; i < 4; ++i) {
      const u32 even = of[i] & 0x0F0F0F0F, odd = of[i] >> 4 & 0x0F0F0F0F;
      exponents[4 * n + i][0] = exponents_of(__byte_perm(even, odd, 0x5140), base);
      exponents[4 * n + i][1] = exponents_of(__byte_perm(even, odd, 0x7362), base);
    }
  }
#pragma unroll 1
  for (u32 n = 0; n < count; ++n) {
    const u32 exception = __shfl_sync(kAllLanes, n < kWarp ? first : second, n % kWarp), place = exception & 0xFFFF;
    const u32 lane = place / 8;
    const u32 byte = lane % kWarp == thread ? 0xFFu << place % 4 * 8 : 0;
    LMC_UNROLL
    for (u32 v = 0; v < kThreadLanes; ++v)
      for (u32 h = 0; h < 2; ++h)
        if (lane / kWarp == v && place / 4 % 2 == h)
          exponents[v][h] = (exponents[v][h] & ~byte) | ((exception >> 16) * kEachByte & byte);
  }
  LMC_UNROLL
  for (u32 n = 0; n < kThreadLanes / 2; ++n) {
    transpose_pair(rest[n].x, rest[n].z);
    transpose_pair(rest[n].y, rest[n].w);
    const u32 of[2][2] = {{rest[n].x, rest[n].y}, {rest[n].z, rest[n].w}};
    for (u32 i = 0; i < 2; ++i) {
      u32 words[4];
      for (u32 h = 0; h < 2; ++h) {
        words[2 * h] = join(__byte_perm(of[i][h], exponents[2 * n + i][h], 0x5140));
        words[2 * h + 1] = join(__byte_perm(of[i][h], exponents[2 * n + i][h], 0x7362));
      }
      raw[2 * n + i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace lmc::cuda
