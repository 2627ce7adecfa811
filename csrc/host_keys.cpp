// Content ids and prefix keys on the host, with the same functors as the kernels.
#include "ops.h"
#include "simd.h"

namespace lmc::cpu {
namespace {

constexpr u64 kBlockIds = blake3::kBlockBytes / 8;

void check_token_ids(TokenIds token_ids, u64 end) {
  for (u64 p = 0; p < end; ++p) {
    const i64 id = token_ids[p];
    if (static_cast<u64>(id) < kTokenIdEnd) continue;
    throw std::invalid_argument("token_ids[" + std::to_string(p) + "]: expected a token id in [0, 2**32), got " +
                                std::to_string(id) + (id < 0 ? " (are these ids overwritten already?)" : ""));
  }
}

// Computes content ids in ascending windows. Keeps only the items that can overlap later windows.
class ContentIds {
 public:
  // token_ids[0] is position `base` of the prompt.
  ContentIds(TokenIds token_ids, const ItemTable& items, u64 base = 0)
      : token_ids_(token_ids), items_(items), base_(base) {
    active_.reserve(items.spans.size());  // so that `read` allocates nothing
  }

  // ids[0, count) = the content ids of positions [first, first + count). False if a token id is outside [0, 2^32); then
  // the ids are garbage.
  bool read(u64 first, u64 count, u64* ids) {
    const u64 end = first + count;
    for (; next_ < items_.spans.size() && items_.spans[next_].offset < end; ++next_)
      active_.push_back(&items_.spans[next_]);
    active_.erase(
        std::remove_if(active_.begin(), active_.end(), [first](const ItemSpan* item) { return item->end <= first; }),
        active_.end());
    u64 all = 0;
    if (token_ids_.wide) {
      const u64* from = static_cast<const u64*>(token_ids_.data) + (first - base_);
      for (u64 i = 0; i < count; ++i) all |= ids[i] = from[i];
    } else {
      const std::int32_t* from = static_cast<const std::int32_t*>(token_ids_.data) + (first - base_);
      for (u64 i = 0; i < count; ++i) all |= ids[i] = static_cast<u64>(static_cast<i64>(from[i]));
    }
    for (const ItemSpan* item : active_) {
      const u64 from = std::max(item->offset, first), to = std::min(item->end, end);
      if (from >= to) continue;
      const blake3::Node& root = item->root;
      simd().hash_many.add_extended_output(ids + (from - first), to - from, root.cv, root.block, root.block_bytes,
                                           root.flags, from - item->offset);
    }
    return all < kTokenIdEnd;
  }

 private:
  TokenIds token_ids_;
  const ItemTable& items_;
  u64 base_;
  std::size_t next_ = 0;
  std::vector<const ItemSpan*> active_;
};

constexpr u32 kMaxLanes = 16;

}  // namespace

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

void check_cuts(const std::vector<u64>& cuts, u64 count) {
  for (std::size_t i = 0; i < cuts.size(); ++i)
    if (static_cast<i64>(cuts[i]) < 0 || (i && cuts[i] <= cuts[i - 1]))
      throw std::invalid_argument("cuts: expected strictly ascending token counts from 0 on, got " +
                                  std::to_string(static_cast<i64>(cuts[i])) + " at index " + std::to_string(i));
  if (!cuts.empty() && cuts.back() > count)
    throw std::invalid_argument("cuts: expected at most the prompt's " + std::to_string(count) + " tokens, got " +
                                std::to_string(cuts.back()));
}

// Computes the tree of all prefixes at once: first the leaves and the last leaf of each prefix, then the levels above,
// then each key folds the subtrees that it needs. All of it runs in batches that fill the vectors.
void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts,
                 u8* keys) {
  const u64 count = cuts.empty() ? 0 : cuts.back();
  const HashMany& hash = simd().hash_many;
  u32 key[blake3::kKeyWords];
  std::memcpy(key, root, 32);

  // nodes[d][i]: the chaining value of leaves [i 2^d, (i + 1) 2^d).
  const u64 full_leaves = count / kLeafIds;
  std::vector<std::vector<ChainingValue>> nodes(1);
  nodes[0].resize(full_leaves);
  std::vector<ChainingValue> folds(cuts.size());  // by prefix: first its last leaf, in the end its hash

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
    // A prefix that ends with a full leaf needs only that leaf, unless the leaf is the root.
    const auto ends_leaf = [](u64 end) { return end % kLeafIds == 0 && end > kLeafIds; };
    std::size_t cuts_end = cut;
    bool within_leaves = false;
    for (; cuts_end < cuts.size() && cuts[cuts_end] <= first + here; ++cuts_end)
      within_leaves |= !ends_leaf(cuts[cuts_end]);
    hash.leaves(ids, leaves, key, blake3::kKeyedHash, first_leaf, within_leaves ? running : nullptr, leaf_cvs);
    if (const u64 full = std::min<u64>(leaves, full_leaves - std::min(full_leaves, first_leaf)))
      std::memcpy(nodes[0].data() + first_leaf, leaf_cvs, 32 * full);

    // The last leaf of each prefix that ends here: continue the chain before its last 64 bytes with those bytes.
    u32 n = 0;
    for (; cut < cuts_end; ++cut) {
      const u64 last = cuts[cut] - 1 - first;
      const u64 leaf = last / kLeafIds, b = last % kLeafIds / kBlockIds, bytes = 8 * (last % kBlockIds + 1);
      if (ends_leaf(cuts[cut])) {
        blake3::copy_cv(folds[cut].data(), leaf_cvs[leaf]);
        continue;
      }
      std::memset(blocks[n], 0, blake3::kBlockBytes);
      std::memcpy(blocks[n], ids + last / kBlockIds * kBlockIds, bytes);
      batch[n] = {b == 0 ? key : running[(b - 1) * hash.lanes + leaf],
                  blocks[n],
                  folds[cut].data(),
                  first_leaf + leaf,
                  static_cast<u32>(bytes),
                  blake3::kKeyedHash | blake3::kLeafEnd | (b == 0 ? blake3::kLeafStart : 0) |
                      (first_leaf + leaf == 0 ? blake3::kRoot : 0)};
      if (++n == hash.lanes) {
        hash.compress(batch, n);
        n = 0;
      }
    }
    hash.compress(batch, n);
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
    u64 left[kMaxLanes];  // how many leaves still have to be folded in; the leaves after them are in the fold
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

RunningKeys::RunningKeys(const ItemTable& items, const u8 root[32]) : items_(items) {
  std::memcpy(root_, root, 32);
  subtrees_.reserve(64);  // so that `extend` allocates nothing once it has started
}

// The key of the first `cut` tokens, whose last leaf begins at `leaf`; leaf_cv is its chaining value if it is full.
void RunningKeys::put_key(u64 cut, const u64* leaf, const u32* leaf_cv, u8* key) const {
  u32 block[blake3::kBlockWords];
  u32* x = block;  // H, followed by T
  const u64 ids = cut - leaves_ * kLeafIds;
  const u32 root_flag = subtrees_.empty() ? blake3::kRoot : 0;
  if (leaf_cv && ids == kLeafIds && !root_flag) {
    blake3::copy_cv(x, leaf_cv);
  } else {
    const blake3::Node node =
        blake3::leaf_node(root_, blake3::kKeyedHash, {reinterpret_cast<const char*>(leaf), 8 * ids}, leaves_);
    blake3::compress_cv(x, node.cv, node.block, node.counter, node.block_bytes, node.flags | root_flag);
  }
  for (std::size_t i = subtrees_.size(); i > 0; --i)
    blake3::parent_cv(x, subtrees_[i - 1].data(), x, root_, blake3::kKeyedHash | (i == 1 ? blake3::kRoot : 0));
  blake3::copy_cv(block + blake3::kKeyWords, items_.chain[items_.begun_before(cut)].data());
  u32 out[blake3::kKeyWords];
  blake3::compress_cv(out, root_, block, 0, blake3::kBlockBytes,
                      blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
  std::memcpy(key, out, 32);
}

void RunningKeys::push_leaf(const u32* cv) {
  ChainingValue x;
  blake3::copy_cv(x.data(), cv);
  for (u64 merged = ++leaves_; merged % 2 == 0; merged /= 2) {
    blake3::parent_cv(x.data(), subtrees_.back().data(), x.data(), root_, blake3::kKeyedHash);
    subtrees_.pop_back();
  }
  subtrees_.push_back(x);
}

void RunningKeys::extend(TokenIds token_ids, const std::vector<u64>& cuts, u8* keys) {
  const u64 end = tokens_ + token_ids.count;
  check_cuts(cuts, end);
  if (!cuts.empty() && cuts.front() < tokens_)
    throw std::invalid_argument("cuts: expected at least the " + std::to_string(tokens_) +
                                " tokens that there were, got " + std::to_string(cuts.front()));
  check_token_ids(token_ids, token_ids.count);
  const HashMany& hash = simd().hash_many;
  ContentIds content(token_ids, items_, tokens_);
  alignas(64) u64 ids[kMaxLanes * kLeafIds];
  u32 cvs[kMaxLanes][blake3::kKeyWords];
  std::size_t cut = 0;
  const auto put_keys = [&](u64 until, const u64* leaf, const u32* leaf_cv) {
    for (; cut < cuts.size() && cuts[cut] <= until; ++cut) put_key(cuts[cut], leaf, leaf_cv, keys + 32 * cut);
  };
  put_keys(tokens_, last_, nullptr);
  while (tokens_ < end) {
    u64 here = tokens_ - leaves_ * kLeafIds;  // ids of the last leaf
    if (here == kLeafIds) {
      hash.leaves(last_, 1, root_, blake3::kKeyedHash, leaves_, nullptr, cvs);
      push_leaf(cvs[0]);
      here = 0;
    }
    // Several whole leaves at once, without the last leaf.
    const u64 whole = here ? 0 : std::min<u64>(hash.lanes, (end - tokens_ - 1) / kLeafIds);
    if (whole) {
      content.read(tokens_, whole * kLeafIds, ids);
      hash.leaves(ids, static_cast<u32>(whole), root_, blake3::kKeyedHash, leaves_, nullptr, cvs);
      for (u64 i = 0; i < whole; ++i) {
        tokens_ += kLeafIds;
        put_keys(tokens_, ids + i * kLeafIds, cvs[i]);
        push_leaf(cvs[i]);
      }
      continue;
    }
    const u64 more = std::min(kLeafIds - here, end - tokens_);
    content.read(tokens_, more, last_ + here);
    tokens_ += more;
    put_keys(tokens_, last_, nullptr);
  }
}

}  // namespace lmc::cpu
