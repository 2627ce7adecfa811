// Where each byte of a payload lies in a paged cache: all index arithmetic of gather and scatter, host and device.
#pragma once

#include "checksum.h"

namespace lmc {

// Division of n < 2^62 by a fixed d >= 1 with one high multiplication. With s = ceil(log2 d) and
// m = floor(2^(62+s) / d) + 1, floor(n m / 2^(62+s)) is exact, since n (m d - 2^(62+s)) < 2^(62+s).
struct Divisor {
  u64 d = 1;
  u64 m = (u64{1} << 62) + 1;
  u32 s = 0;

  Divisor() = default;
  explicit Divisor(u64 divisor) : d(divisor) {
    while ((u64{1} << s) < d) ++s;
    m = static_cast<u64>((static_cast<unsigned __int128>(1) << (62 + s)) / d) + 1;
  }
  LMC_HOST_DEVICE u64 divide(u64 n) const { return multiply_high(n << 2, m) >> s; }
  LMC_HOST_DEVICE u64 divide(u64 n, u64& remainder) const {
    const u64 q = divide(n);
    remainder = n - q * d;
    return q;
  }
};

// One paged cache, byte by byte. Plane i begins at planes[i]; page p of it at planes[i] + p * page_stride; byte x of a
// page at (x / run_bytes) * run_stride + x % run_bytes behind that. `token_bytes` contiguous bytes of a page belong to
// one token, and so on around: byte x belongs to slot (x / token_bytes) % page_tokens. 0: the page is opaque.
struct PagedLayout {
  u8* const* planes;
  u64 num_planes;
  u64 num_pages;
  u64 page_stride;
  u64 run_stride;
  Divisor page_bytes;
  Divisor run_bytes;
  Divisor page_tokens;
  Divisor token_bytes;
  bool opaque;

  LMC_HOST_DEVICE u64 row_bytes() const { return page_tokens.divide(page_bytes.d); }
};

// One chunk of a call. `ids`: block ids (page mode) or slots (token mode), int32 or int64.
struct Chunk {
  const void* ids;
  u64 count;   // pages or tokens
  u64 tokens;  // page mode: how many tokens of the pages count, the rest of the last page being zeroed by a gather
  u8* payload;
  bool wide;  // ids are int64

  LMC_HOST_DEVICE i64 id(u64 i) const {
    return wide ? static_cast<const i64*>(ids)[i] : static_cast<const std::int32_t*>(ids)[i];
  }
};

// A contiguous piece of the cache behind a byte of a payload; `cache` is null where the cache holds nothing for it:
// no such page, or a slot past the tail.
struct Span {
  u8* cache;
  u64 bytes;
};

LMC_HOST_DEVICE u64 at_most(u64 a, u64 b) { return a < b ? a : b; }

// Page mode, payload = [plane][page][page byte]: the span behind payload byte `y`, ending within its page.
LMC_HOST_DEVICE Span page_span(const PagedLayout& layout, const Chunk& chunk, u64 y) {
  u64 x, in_run;
  const u64 row = layout.page_bytes.divide(y, x);
  const u64 plane = row / chunk.count;
  const u64 page = row - plane * chunk.count;
  const u64 run = layout.run_bytes.divide(x, in_run);
  Span span{nullptr, layout.run_bytes.d - in_run};
  const i64 block = chunk.id(page);
  if (static_cast<u64>(block) >= layout.num_pages) return span;
  const u64 valid = chunk.tokens - page * layout.page_tokens.d;
  if (valid < layout.page_tokens.d) {
    u64 in_token, slot;
    layout.page_tokens.divide(layout.token_bytes.divide(x, in_token), slot);
    if (slot >= valid) {
      span.bytes = at_most(span.bytes, (layout.page_tokens.d - slot) * layout.token_bytes.d - in_token);
      return span;
    }
    span.bytes = at_most(span.bytes, (valid - slot) * layout.token_bytes.d - in_token);
  }
  span.cache = layout.planes[plane] + block * layout.page_stride + run * layout.run_stride + in_run;
  return span;
}

// Token mode, payload = [plane][token][row byte]: the span behind payload byte `y`, ending within its row.
LMC_HOST_DEVICE Span token_span(const PagedLayout& layout, const Chunk& chunk, u64 y) {
  const u64 row_bytes = layout.row_bytes();
  const u64 row = y / row_bytes;
  const u64 plane = row / chunk.count;
  u64 in_token, slot, in_run;
  const u64 group = layout.token_bytes.divide(y - row * row_bytes, in_token);
  const u64 position = static_cast<u64>(chunk.id(row - plane * chunk.count));
  Span span{nullptr, layout.token_bytes.d - in_token};
  if (position >= layout.num_pages * layout.page_tokens.d) return span;
  const u64 block = layout.page_tokens.divide(position, slot);
  const u64 x = (group * layout.page_tokens.d + slot) * layout.token_bytes.d + in_token;
  const u64 run = layout.run_bytes.divide(x, in_run);
  span.bytes = at_most(span.bytes, layout.run_bytes.d - in_run);
  span.cache = layout.planes[plane] + block * layout.page_stride + run * layout.run_stride + in_run;
  return span;
}

}  // namespace lmc
