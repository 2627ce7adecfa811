// Where each piece of a payload is in a paged cache: all index arithmetic of gather and scatter, host and device.
//
// Sizes and positions are in units of 1, 4 or 16 bytes, chosen per call; `Index` is u32 if they fit, else u64.
#pragma once

#include <vector>

#include "launch.h"

namespace lmc {

LMC_HOST_DEVICE u64 multiply_high(u64 a, u64 b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

LMC_HOST_DEVICE u32 multiply_high(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }

// Divides n < 2^(w-2) by a fixed d in [1, 2^(w-2)) with one high multiplication; w is the width of Index. With
// s = ceil(log2 d) and m = floor(2^(w-2+s) / d) + 1, floor(n m / 2^(w-2+s)) is exact: n (m d - 2^(w-2+s)) < 2^(w-2+s).
template <typename Index>
struct Divisor {
  Index d = 1;
  Index m = 0;
  u32 s = 0;

  static constexpr u32 kBits = 8 * sizeof(Index) - 2;

  Divisor() = default;
  explicit Divisor(u64 divisor) : d(static_cast<Index>(divisor)) {
    while ((u64{1} << s) < divisor) ++s;
    m = static_cast<Index>((static_cast<unsigned __int128>(1) << (kBits + s)) / divisor + 1);
  }
  LMC_HOST_DEVICE Index divide(Index n) const { return multiply_high(static_cast<Index>(n << 2), m) >> s; }
  LMC_HOST_DEVICE Index divide(Index n, Index& remainder) const {
    const Index q = divide(n);
    remainder = n - q * d;
    return q;
  }
};

// Each of `blocks` blocks takes a contiguous range of at least one of `tiles` tiles: blocks <= tiles.
LMC_HOST_DEVICE u64 first_tile(u64 block, u64 tiles, u64 blocks) { return tiles * block / blocks; }
LMC_HOST_DEVICE u64 block_of_tile(u64 tile, u64 tiles, u64 blocks) { return ((tile + 1) * blocks - 1) / tiles; }

enum class Mode { kPage, kToken };

// One paged cache. Plane i begins at planes[i], its page p at planes[i] + p * page_stride bytes, and unit x of a page
// (x / run) * run_stride bytes plus x % run units after that. `token` contiguous units of a page belong to one token,
// cyclically: unit x belongs to slot (x / token) % page_tokens.
template <typename Index>
struct PagedLayout {
  u8* const* planes;
  u64 num_pages;
  u64 page_stride;
  u64 run_stride;
  Divisor<Index> page;
  Divisor<Index> run;
  Divisor<Index> token;  // opaque pages: the whole page, and no chunk has a tail
  Divisor<u64> page_tokens;
  Divisor<Index> slots;  // also page_tokens, for division of units
  Divisor<Index> row;    // the units of one token in a plane
  u32 unit_bytes;
};

// One chunk of a call. `ids`: block ids (page mode) or slots (token mode), int32 or int64.
struct Chunk {
  const void* ids;
  u64 count;   // pages or tokens
  u64 tokens;  // page mode: how many tokens of the pages are valid; a gather zeroes the rest of the last page
  u8* payload;
  bool wide;       // ids are int64
  u64 offset = 0;  // of this part in a longer payload, a multiple of 16: says which checksum lanes it has

  LMC_HOST_DEVICE u64 id(u64 i) const {
    return static_cast<u64>(wide ? static_cast<const i64*>(ids)[i] : static_cast<const std::int32_t*>(ids)[i]);
  }
};

// The contiguous piece of the cache that a unit of a payload begins. `cache` is null if the cache has nothing for it: a
// missing page, or a slot past the tail.
template <typename Index>
struct Span {
  u8* cache;
  Index units;
};

template <typename Index>
LMC_HOST_DEVICE Index at_most(Index a, Index b) {
  return a < b ? a : b;
}

template <typename Index>
LMC_HOST_DEVICE u8* cache_address(const PagedLayout<Index>& layout, Index plane, u64 block, Index run, Index in_run) {
  return layout.planes[plane] + block * layout.page_stride + run * layout.run_stride +
         static_cast<u64>(in_run) * layout.unit_bytes;
}

// Page mode, payload = [plane][page][page unit]: the span of payload unit `y`, which ends within its run. `count`: of
// the chunk.
template <typename Index>
LMC_HOST_DEVICE Span<Index> page_span(const PagedLayout<Index>& layout, const Chunk& chunk, Divisor<Index> count,
                                      Index y) {
  Index x, page, in_run;
  const Index plane = count.divide(layout.page.divide(y, x), page);
  const Index run = layout.run.divide(x, in_run);
  Span<Index> span{nullptr, layout.run.d - in_run};
  const u64 block = chunk.id(page);
  if (block >= layout.num_pages) return span;
  const u64 valid = chunk.tokens - page * layout.page_tokens.d;
  if (valid < layout.page_tokens.d) {
    Index in_token, slot;
    layout.slots.divide(layout.token.divide(x, in_token), slot);
    const Index end = static_cast<Index>(slot < valid ? valid : layout.page_tokens.d);
    span.units = at_most(span.units, (end - slot) * layout.token.d - in_token);
    if (slot >= valid) return span;
  }
  span.cache = cache_address(layout, plane, block, run, in_run);
  return span;
}

// Token mode, payload = [plane][token][row unit]: the span of payload unit `y`, which ends within its row.
template <typename Index>
LMC_HOST_DEVICE Span<Index> token_span(const PagedLayout<Index>& layout, const Chunk& chunk, Divisor<Index> count,
                                       Index y) {
  Index r, i, in_token, in_run;
  const Index plane = count.divide(layout.row.divide(y, r), i);
  const Index group = layout.token.divide(r, in_token);
  Span<Index> span{nullptr, layout.token.d - in_token};
  const u64 position = chunk.id(i);
  if (position >= layout.num_pages * layout.page_tokens.d) return span;
  u64 slot;
  const u64 block = layout.page_tokens.divide(position, slot);
  const Index x = (group * layout.slots.d + static_cast<Index>(slot)) * layout.token.d + in_token;
  const Index run = layout.run.divide(x, in_run);
  span.units = at_most(span.units, layout.run.d - in_run);
  span.cache = cache_address(layout, plane, block, run, in_run);
  return span;
}

// --- Host only: a layout in bytes, as Python describes it.

struct PagedCache {
  std::vector<u8*> planes;
  u64 num_pages;
  u64 page_stride;
  u64 page_bytes;
  u64 run_bytes;
  u64 run_stride;
  u64 page_tokens;
  u64 token_bytes;  // 0: opaque

  u64 row_bytes() const { return page_bytes / page_tokens; }
  u64 payload_bytes(Mode mode, const Chunk& chunk) const {
    return planes.size() * chunk.count * (mode == Mode::kPage ? page_bytes : row_bytes());
  }
  // Whether the spans of a chunk may begin or end between the tokens of a page.
  bool splits_pages(Mode mode, const Chunk& chunk) const {
    return mode == Mode::kToken || chunk.tokens < chunk.count * page_tokens;
  }

  // `plane_table`: the addresses of the planes, readable where the result is used.
  template <typename Index>
  PagedLayout<Index> in_units(u32 unit_bytes, u8* const* plane_table) const {
    // Divisors that this call does not use need not be multiples of the unit, but must not be 0.
    const auto units = [unit_bytes](u64 bytes) { return Divisor<Index>(bytes < unit_bytes ? 1 : bytes / unit_bytes); };
    return {plane_table,
            num_pages,
            page_stride,
            run_stride,
            units(page_bytes),
            units(run_bytes),
            units(token_bytes ? token_bytes : page_bytes),
            Divisor<u64>(page_tokens),
            Divisor<Index>(page_tokens),
            units(row_bytes()),
            unit_bytes};
  }
};

}  // namespace lmc
