// The operations on the host, by the same functors as the kernels.
#include <atomic>

#include "hash_many.h"
#include "ops.h"

namespace lmc::cpu {
namespace {

// What this machine can run, the fastest first.
std::vector<const HashMany*> runnable() {
  std::vector<const HashMany*> all;
#ifdef LMCACHE_MM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    all.push_back(&avx512::hash_many);
  if (__builtin_cpu_supports("avx2")) all.push_back(&avx2::hash_many);
#endif
  all.push_back(&portable::hash_many);
  return all;
}

std::atomic<const HashMany*> chosen{nullptr};

const HashMany& hash_many() {
  const HashMany* hash = chosen.load(std::memory_order_relaxed);
  if (!hash) chosen.store(hash = runnable().front(), std::memory_order_relaxed);
  return *hash;
}

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

  // ids[0, count) = the content ids of positions [first, first + count). False if a token id is outside [0, 2^32); the
  // ids are worthless then.
  bool read(u64 first, u64 count, u64* ids) {
    const u64 end = first + count;
    for (; next_ < items_.spans.size() && items_.spans[next_].offset < end; ++next_)
      active_.push_back(&items_.spans[next_]);
    active_.erase(
        std::remove_if(active_.begin(), active_.end(), [first](const ItemSpan* item) { return item->end <= first; }),
        active_.end());
    u64 all = 0;
    if (token_ids_.wide) {
      const u64* from = static_cast<const u64*>(token_ids_.data) + first;
      for (u64 i = 0; i < count; ++i) all |= ids[i] = from[i];
    } else {
      const std::int32_t* from = static_cast<const std::int32_t*>(token_ids_.data) + first;
      for (u64 i = 0; i < count; ++i) all |= ids[i] = static_cast<u64>(static_cast<i64>(from[i]));
    }
    for (const ItemSpan* item : active_) {
      const u64 from = std::max(item->offset, first), to = std::min(item->end, end);
      if (from >= to) continue;
      const blake3::Node& root = item->root;
      hash_many().add_extended_output(ids + (from - first), to - from, root.cv, root.block, root.block_bytes,
                                      root.flags, from - item->offset);
    }
    return all < kTokenIdEnd;
  }

 private:
  TokenIds token_ids_;
  const ItemTable& items_;
  std::size_t next_ = 0;
  std::vector<const ItemSpan*> active_;
};

using ChainingValue = std::array<u32, blake3::kKeyWords>;

constexpr u32 kMaxLanes = 16;

}  // namespace

std::vector<std::string> simd_variants() {
  std::vector<std::string> names;
  for (const HashMany* hash : runnable()) names.push_back(hash->name);
  return names;
}

void use_simd(const std::string& name) {
  for (const HashMany* hash : runnable())
    if (hash->name == name) return chosen.store(hash, std::memory_order_relaxed);
  throw std::invalid_argument("name: expected one of simd_variants(), got " + name);
}

void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items) {
  const TokenIds ids{token_ids, count, true};
  check_token_ids(ids, count);
  ContentIds content(ids, items);
  constexpr u64 kWindow = 2048;
  for (u64 first = 0; first < count; first += kWindow) {
    const u64 here = std::min(kWindow, count - first);
    u64 words[kWindow];
    content.read(first, here, words);
    std::memcpy(token_ids + first, words, 8 * here);
  }
}

// The tree of all prefixes at once: first the leaves, and the last leaf of each prefix, then the levels above, then
// each key folds the subtrees that it needs. Everything is done in batches that fill the vectors.
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts,
                 u8* keys) {
  const u64 count = cuts.empty() ? 0 : cuts.back();
  const HashMany& hash = hash_many();
  u32 key[blake3::kKeyWords];
  std::memcpy(key, root, 32);

  // nodes[d][i]: the chaining value of leaves [i 2^d, (i + 1) 2^d).
  const u64 full_leaves = count / kLeafIds;
  std::vector<std::vector<ChainingValue>> nodes(1);
  nodes[0].resize(full_leaves);
  std::vector<ChainingValue> folds(cuts.size());  // of each prefix: its last leaf, and at the end its hash

  ContentIds content(token_ids, items);
  std::size_t cut = 0;
  if (cut < cuts.size() && cuts[cut] == 0) {
    const u32 nothing[blake3::kBlockWords] = {};
    blake3::compress_cv(folds[cut++].data(), key, nothing, 0, 0,
                        blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
  }
  alignas(64) u64 ids[kMaxLanes * kLeafIds];
  u32 running[blake3::kLeafBlocks * kMaxLanes][blake3::kKeyWords];
  u32 leaf_cvs[kMaxLanes][blake3::kKeyWords];
  u32 blocks[kMaxLanes][blake3::kBlockWords];
  Compression batch[kMaxLanes];
  for (u64 first = 0; first < count; first += hash.lanes * kLeafIds) {
    const u64 here = std::min(hash.lanes * kLeafIds, count - first);
    const u64 first_leaf = first / kLeafIds;
    const u32 leaves = static_cast<u32>((here + kLeafIds - 1) / kLeafIds);
    if (!content.read(first, here, ids)) check_token_ids(token_ids, count);
    std::fill(ids + here, ids + leaves * kLeafIds, 0);
    hash.leaves(ids, leaves, key, blake3::kKeyedHash, first_leaf, running, leaf_cvs);
    if (const u64 full = std::min<u64>(leaves, full_leaves - std::min(full_leaves, first_leaf)))
      std::memcpy(nodes[0].data() + first_leaf, leaf_cvs, 32 * full);

    // The last leaf of every prefix that ends here: the chain before its last 64 bytes, finished with them.
    while (cut < cuts.size() && cuts[cut] <= first + here) {
      u32 n = 0;
      for (; n < hash.lanes && cut < cuts.size() && cuts[cut] <= first + here; ++n, ++cut) {
        const u64 last = cuts[cut] - 1 - first;
        const u64 leaf = last / kLeafIds, b = last % kLeafIds / kBlockIds, bytes = 8 * (last % kBlockIds + 1);
        std::memset(blocks[n], 0, blake3::kBlockBytes);
        std::memcpy(blocks[n], ids + last / kBlockIds * kBlockIds, bytes);
        const bool only = first_leaf + leaf == 0;
        batch[n] = {
            b == 0 ? key : running[(b - 1) * hash.lanes + leaf],
            blocks[n],
            folds[cut].data(),
            first_leaf + leaf,
            static_cast<u32>(bytes),
            blake3::kKeyedHash | blake3::kLeafEnd | (b == 0 ? blake3::kLeafStart : 0) | (only ? blake3::kRoot : 0)};
      }
      hash.compress(batch, n);
    }
  }

  while (nodes.back().size() > 1) {
    const std::vector<ChainingValue>& children = nodes.back();
    std::vector<ChainingValue> parents(children.size() / 2);
    for (u64 i = 0; i < parents.size();) {
      u32 n = 0;
      for (; n < hash.lanes && i < parents.size(); ++n, ++i)
        batch[n] = {key, children[2 * i].data(), parents[i].data(),
                    0,   blake3::kBlockBytes,    blake3::kKeyedHash | blake3::kParent};
      hash.compress(batch, n);
    }
    nodes.push_back(std::move(parents));
  }

  for (std::size_t begin = 0; begin < cuts.size(); begin += hash.lanes) {
    const u32 lanes = static_cast<u32>(std::min<u64>(hash.lanes, cuts.size() - begin));
    u64 left[kMaxLanes];  // the leaves whose subtrees are still to be folded in, all behind them being in the fold
    for (u32 i = 0; i < lanes; ++i) left[i] = cuts[begin + i] ? (cuts[begin + i] - 1) / kLeafIds : 0;
    for (;;) {
      u32 n = 0;
      for (u32 i = 0; i < lanes; ++i) {
        if (left[i] == 0) continue;
        const int level = __builtin_ctzll(left[i]);
        u32* fold = folds[begin + i].data();
        blake3::copy_cv(blocks[n], nodes[level][(left[i] >> level) - 1].data());
        blake3::copy_cv(blocks[n] + blake3::kKeyWords, fold);
        left[i] &= left[i] - 1;
        batch[n] = {
            key, blocks[n],           fold,
            0,   blake3::kBlockBytes, blake3::kKeyedHash | blake3::kParent | (left[i] == 0 ? blake3::kRoot : 0)};
        ++n;
      }
      if (n == 0) break;
      hash.compress(batch, n);
    }
    for (u32 i = 0; i < lanes; ++i) {
      u32* fold = folds[begin + i].data();
      blake3::copy_cv(blocks[i], fold);
      blake3::copy_cv(blocks[i] + blake3::kKeyWords, items.chain[items.begun_before(cuts[begin + i])].data());
      batch[i] = {key, blocks[i],           fold,
                  0,   blake3::kBlockBytes, blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot};
    }
    hash.compress(batch, lanes);
  }
  if (!folds.empty()) std::memcpy(keys, folds.data(), 32 * folds.size());
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
