// The operations on the host, by the same functors as the kernels.
#include "ops.h"

namespace lmc::cpu {
namespace {

constexpr u64 kLeafIds = blake3::kLeafBytes / 8;
constexpr u64 kBlockIds = blake3::kBlockBytes / 8;

void check_token_ids(TokenIds token_ids, u64 end) {
  for (u64 p = 0; p < end; ++p) {
    const i64 id = token_ids[p];
    if (static_cast<u64>(id) < kTokenIdEnd) continue;
    throw std::invalid_argument("token_ids[" + std::to_string(p) + "]: expected a token id in [0, 2**32), got " +
                                std::to_string(id) + (id < 0 ? " (are these ids overwritten already?)" : ""));
  }
}

// Hands out content ids in ascending windows; keeps only the items that a window can meet.
class ContentIds {
 public:
  ContentIds(TokenIds token_ids, const ItemTable& items) : token_ids_(token_ids), items_(items) {}

  // ids[0, count) = the content ids of positions [first, first + count), count <= kLeafIds.
  void read(u64 first, u64 count, u64* ids) {
    const u64 end = first + count;
    for (; next_ < items_.spans.size() && items_.spans[next_].offset < end; ++next_)
      active_.push_back(&items_.spans[next_]);
    active_.erase(
        std::remove_if(active_.begin(), active_.end(), [first](const ItemSpan* item) { return item->end <= first; }),
        active_.end());
    for (u64 i = 0; i < count; ++i) ids[i] = static_cast<u64>(token_ids_[first + i]);
    for (const ItemSpan* item : active_) overwrite(*item, first, end, ids);
  }

 private:
  // `ids` holds positions [first, end); the mark in the top bit is set again after every sum.
  static void overwrite(const ItemSpan& item, u64 first, u64 end, u64* ids) {
    const u64 from = std::max(item.offset, first), to = std::min(item.end, end);
    for (u64 p = from; p < to;) {
      const u64 block = (p - item.offset) / kLanesPerBlock;
      const u64 block_end = std::min(to, item.offset + (block + 1) * kLanesPerBlock);
      u64 lanes[kLanesPerBlock];
      lane_block(lanes, item, block);
      for (; p < block_end; ++p)
        ids[p - first] = overwritten(ids[p - first], lanes[(p - item.offset) % kLanesPerBlock]);
    }
  }

  TokenIds token_ids_;
  const ItemTable& items_;
  std::size_t next_ = 0;
  std::vector<const ItemSpan*> active_;
};

}  // namespace

void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items) {
  const TokenIds ids{token_ids, count, true};
  check_token_ids(ids, count);
  ContentIds content(ids, items);
  for (u64 first = 0; first < count; first += kLeafIds) {
    const u64 here = std::min(kLeafIds, count - first);
    u64 words[kLeafIds];
    content.read(first, here, words);
    std::memcpy(token_ids + first, words, 8 * here);
  }
}

void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts,
                 u8* keys) {
  const u64 count = cuts.empty() ? 0 : cuts.back();
  check_token_ids(token_ids, count);
  u32 key[blake3::kKeyWords];
  std::memcpy(key, root, 32);
  ContentIds content(token_ids, items);

  // Chaining values of the complete subtrees left of the current leaf, one for each set bit of the leaf's number.
  u32 stack[64][blake3::kKeyWords];

  std::size_t cut = 0;
  auto write_key = [&](u64 end, const u32 prefix_hash[blake3::kKeyWords]) {
    u32 block[blake3::kBlockWords], out[blake3::kKeyWords];
    blake3::copy_cv(block, prefix_hash);
    blake3::copy_cv(block + blake3::kKeyWords, items.chain[items.begun_before(end)].data());
    blake3::compress_cv(out, key, block, 0, blake3::kBlockBytes,
                        blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
    std::memcpy(keys + 32 * cut++, out, 32);
  };

  if (cut < cuts.size() && cuts[cut] == 0) {
    const u32 nothing[blake3::kBlockWords] = {};
    u32 hash[blake3::kKeyWords];
    blake3::compress_cv(hash, key, nothing, 0, 0,
                        blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
    write_key(0, hash);
  }
  for (u64 leaf = 0; leaf * kLeafIds < count; ++leaf) {
    const u64 first = leaf * kLeafIds, here = std::min(kLeafIds, count - first);
    u64 ids[kLeafIds] = {};
    content.read(first, here, ids);

    u32 running[blake3::kKeyWords];
    blake3::copy_cv(running, key);
    for (u64 b = 0; b * kBlockIds < here; ++b) {
      const u32 flags = blake3::kKeyedHash | (b == 0 ? blake3::kLeafStart : 0);
      // Every cut inside this block ends a leaf of its own: the running value, finished with the ids before the cut.
      for (; cut < cuts.size() && cuts[cut] - first <= (b + 1) * kBlockIds;) {
        const u64 in_block = cuts[cut] - first - b * kBlockIds;
        u32 block[blake3::kBlockWords] = {}, hash[blake3::kKeyWords];
        std::memcpy(block, ids + b * kBlockIds, 8 * in_block);
        blake3::compress_cv(hash, running, block, leaf, static_cast<u32>(8 * in_block),
                            flags | blake3::kLeafEnd | (leaf == 0 ? blake3::kRoot : 0));
        for (u64 left = leaf; left != 0; left &= left - 1)
          blake3::parent_cv(hash, stack[__builtin_ctzll(left)], hash, key,
                            blake3::kKeyedHash | ((left & (left - 1)) == 0 ? blake3::kRoot : 0));
        write_key(cuts[cut], hash);
      }
      u32 block[blake3::kBlockWords];
      std::memcpy(block, ids + b * kBlockIds, blake3::kBlockBytes);
      blake3::compress_cv(running, running, block, leaf, blake3::kBlockBytes,
                          flags | (b + 1 == blake3::kLeafBlocks ? blake3::kLeafEnd : 0));
    }
    // The full leaf joins the subtrees it completes. (After a partial leaf there is none to come.)
    int level = 0;
    for (u64 left = leaf; left & 1; left >>= 1)
      blake3::parent_cv(running, stack[level++], running, key, blake3::kKeyedHash);
    blake3::copy_cv(stack[level], running);
  }
}

u64 checksum(const u8* payload, u64 bytes) {
  u64 sum = checksum_length(bytes);
  const u64 lanes = bytes / kLaneBytes;
  for (u64 i = 0; i < lanes; ++i) {
    u64 lane[2];
    std::memcpy(lane, payload + i * kLaneBytes, kLaneBytes);
    sum += checksum_lane(i, lane[0], lane[1]);
  }
  if (const u64 rest = bytes % kLaneBytes) {
    u64 lane[2] = {};
    std::memcpy(lane, payload + lanes * kLaneBytes, rest);
    sum += checksum_lane(lanes, lane[0], lane[1]);
  }
  return sum;
}

namespace {

u64 payload_bytes(const PagedCache& cache, Mode mode, const Chunk& chunk) {
  return cache.planes.size() * chunk.count * (mode == Mode::kPage ? cache.page_bytes : cache.row_bytes());
}

// Calls copy(payload, cache or null, bytes) for every span of a chunk.
template <typename Copy>
void for_each_span(const PagedCache& cache, Mode mode, const Chunk& chunk, Copy copy) {
  const PagedLayout<u64> layout = cache.in_units<u64>(1, cache.planes.data());
  const u64 bytes = payload_bytes(cache, mode, chunk);
  if (bytes == 0) return;
  const Divisor<u64> count(chunk.count);
  for (u64 y = 0; y < bytes;) {
    const Span<u64> span =
        mode == Mode::kPage ? page_span(layout, chunk, count, y) : token_span(layout, chunk, count, y);
    copy(chunk.payload + y, span.cache, span.units);
    y += span.units;
  }
}

}  // namespace

void check_ids(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks) {
  const char* name = mode == Mode::kPage ? "block_ids" : "slots";
  const u64 end = cache.num_pages * (mode == Mode::kPage ? 1 : cache.page_tokens);
  for (std::size_t c = 0; c < chunks.size(); ++c)
    for (u64 i = 0; i < chunks[c].count; ++i) {
      const i64 id = static_cast<i64>(chunks[c].id(i));
      if (id == -1 || static_cast<u64>(id) < end) continue;
      throw std::invalid_argument(std::string(name) + (chunks.size() > 1 ? "[" + std::to_string(c) + "]" : "") + "[" +
                                  std::to_string(i) + "]: expected an id in [0, " + std::to_string(end) +
                                  "), or -1 to skip, got " + std::to_string(id));
    }
}

void gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums) {
  check_ids(cache, mode, chunks);
  for (const Chunk& chunk : chunks) {
    for_each_span(cache, mode, chunk, [](u8* payload, const u8* from, u64 bytes) {
      if (from)
        std::memcpy(payload, from, bytes);
      else
        std::memset(payload, 0, bytes);
    });
    if (checksums) *checksums++ = checksum(chunk.payload, payload_bytes(cache, mode, chunk));
  }
}

void scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, const u64* expected, bool* matches) {
  check_ids(cache, mode, chunks);
  for (const Chunk& chunk : chunks) {
    for_each_span(cache, mode, chunk, [](const u8* payload, u8* to, u64 bytes) {
      if (to) std::memcpy(to, payload, bytes);
    });
    if (expected) *matches++ = checksum(chunk.payload, payload_bytes(cache, mode, chunk)) == *expected++;
  }
}

}  // namespace lmc::cpu
