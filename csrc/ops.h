// The operations, one declaration a piece: cpu:: runs on the caller's thread and is finished on return.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "content_ids.h"
#include "copy_span.h"

namespace lmc {

struct TokenIds {
  const void* data;
  u64 count;
  bool wide;  // int64, else int32

  LMC_HOST_DEVICE i64 operator[](u64 i) const {
    return wide ? static_cast<const i64*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  }
};

enum class Mode { kPage, kToken };

namespace cpu {

// Throws std::invalid_argument, with nothing written, if an id is outside [0, 2^32).
void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items);

// keys: [cuts.size()][32] bytes. `cuts` ascend strictly and do not exceed the count of ids. Throws
// std::invalid_argument, with nothing written, if an id before the last cut is outside [0, 2^32).
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys);

// Host ids: -1 stands for a page or slot that is not there; std::invalid_argument, with nothing written, for others
// outside the cache. checksums: one a chunk, or null.
void gather(const PagedLayout& layout, Mode mode, const std::vector<Chunk>& chunks, u64* checksums);

// expected: one checksum a chunk, or null; matches[i] tells whether chunk i's payload has it.
void scatter(const PagedLayout& layout, Mode mode, const std::vector<Chunk>& chunks, const u64* expected,
             bool* matches);

u64 checksum(const u8* payload, u64 bytes);

}  // namespace cpu
}  // namespace lmc
