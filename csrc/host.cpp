// The operations on the host, with the same functors as the kernels.
#include <atomic>
#include <thread>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "hash_many.h"
#include "lane_copy.h"
#include "ops.h"
#include "tile_codec.h"

namespace lmc::cpu {
namespace {

// The code that is compiled once per instruction set.
struct Simd {
  const HashMany& hash_many;
  const LaneCopy& lane_copy;
  const TileCodec& tile_codec;
};
const Simd kPortable{portable::hash_many, portable::lane_copy, portable::tile_codec};
#ifdef LMCACHE_MM_X86
const Simd kAvx2{avx2::hash_many, avx2::lane_copy, avx2::tile_codec};
const Simd kAvx512{avx512::hash_many, avx512::lane_copy, avx512::tile_codec};
#endif

// The instruction sets that this machine can run, the fastest first.
std::vector<const Simd*> runnable() {
  std::vector<const Simd*> all;
#ifdef LMCACHE_MM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    all.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2")) all.push_back(&kAvx2);
#endif
  all.push_back(&kPortable);
  return all;
}

std::atomic<const Simd*> chosen{nullptr};

const Simd& simd() {
  const Simd* one = chosen.load(std::memory_order_relaxed);
  if (!one) chosen.store(one = runnable().front(), std::memory_order_relaxed);
  return *one;
}

const HashMany& hash_many() { return simd().hash_many; }

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
      hash_many().add_extended_output(ids + (from - first), to - from, root.cv, root.block, root.block_bytes,
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

std::vector<std::string> simd_variants() {
  std::vector<std::string> names;
  for (const Simd* one : runnable()) names.push_back(one->hash_many.name);
  return names;
}

void use_simd(const std::string& name) {
  for (const Simd* one : runnable())
    if (one->hash_many.name == name) return chosen.store(one, std::memory_order_relaxed);
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

void check_cuts(const std::vector<u64>& cuts, u64 count) {
  for (std::size_t i = 0; i < cuts.size(); ++i)
    if (static_cast<i64>(cuts[i]) < 0 || (i && cuts[i] <= cuts[i - 1]))
      throw std::invalid_argument("cuts: expected strictly ascending token counts from 0 on");
  if (!cuts.empty() && cuts.back() > count)
    throw std::invalid_argument("cuts: expected at most the prompt's " + std::to_string(count) + " tokens, got " +
                                std::to_string(cuts.back()));
}

// Computes the tree of all prefixes at once: first the leaves and the last leaf of each prefix, then the levels above,
// then each key folds the subtrees that it needs. All of it runs in batches that fill the vectors.
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
  const HashMany& hash = hash_many();
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

namespace {

// Adds the lanes of `payload`, numbered from `first`. The last lane may be short.
void add_lanes(LaneSums& sums, const u8* payload, u64 bytes, u64 first) {
  const u64 rest = bytes % kLaneBytes, whole = bytes - rest;
  simd().lane_copy.sum(payload, whole, first, &sums);
  if (rest) {
    u64 lane[2] = {};
    std::memcpy(lane, payload + whole, rest);
    sums.add(first + whole / kLaneBytes, lane[0], lane[1]);
  }
}

}  // namespace

u64 checksum_part(const u8* part, u64 bytes, u64 offset, u64 payload_bytes) {
  LaneSums sums;
  add_lanes(sums, part, bytes, offset / kLaneBytes);
  return sums.total() + (offset == 0 ? checksum_length(payload_bytes) : 0);
}

u64 checksum(const u8* payload, u64 bytes) { return checksum_part(payload, bytes, 0, bytes); }

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

namespace {

// From this size on, copies bypass the caches when they write. That is faster if the bytes do not fit into the caches:
// a plain copy would read each destination line before it writes it.
#ifndef LMC_STREAM_BYTES
#define LMC_STREAM_BYTES (4 << 20)
#endif
constexpr u64 kStreamBytes = LMC_STREAM_BYTES;
// How far copies prefetch ahead, because the hardware's prefetcher stops at the end of a 4 KiB page.
constexpr u64 kPrefetchBytes = 4096;
// Each call starts its own threads and keeps none, because threads do not survive a fork.
#ifndef LMC_THREAD_BYTES
#define LMC_THREAD_BYTES (4 << 20)
#endif
constexpr u64 kThreadBytes = LMC_THREAD_BYTES;  // least bytes per thread

void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// One gather or scatter.
struct CopyCall {
  const PagedCache& cache;
  Mode mode;
  const std::vector<Chunk>& chunks;
  bool sums;

  // Whether each span of the call begins and ends at a lane boundary of its payload.
  bool whole_lanes() const {
    u64 all = cache.run_bytes | cache.page_bytes;
    for (const Chunk& chunk : chunks)
      if (cache.splits_pages(mode, chunk)) all |= cache.token_bytes;
    return all % kLaneBytes == 0;
  }
};

// Copies payload bytes [begin, end) of a chunk; `begin` is a multiple of 16. Returns the total of their lanes. beyond:
// what the caller reads next, if it is not what follows `end`.
template <bool kGather, Mode kMode>
u64 copy_part(const CopyCall& call, const PagedLayout<u64>& layout, const Chunk& chunk, u64 begin, u64 end,
              bool whole_lanes, bool stream, const u8* beyond = nullptr) {
  const Divisor<u64> count(chunk.count);
  const auto span_at = [&](u64 y) {
    Span<u64> span = kMode == Mode::kPage ? page_span(layout, chunk, count, y) : token_span(layout, chunk, count, y);
    span.units = std::min(span.units, end - y);
    return span;
  };
  const auto copy_lanes = stream ? simd().lane_copy.stream : simd().lane_copy.copy;
  LaneSums sums;
  const u64 lane0 = chunk.offset / kLaneBytes;
  Span<u64> next = span_at(begin);
  u64 summed = begin;  // without whole lanes: the bytes before it are in the sum
  for (u64 y = begin; y < end;) {
    const Span<u64> span = next;
    u8* payload = chunk.payload + y;
    const u64 following = y + span.units;
    if (following < end) next = span_at(following);
    if (!span.cache) {
      if (kGather) std::memset(payload, 0, span.units);
      if (call.sums && whole_lanes) add_lanes(sums, payload, span.units, lane0 + y / kLaneBytes);
    } else if (whole_lanes) {
      for (u64 done = 0; done < span.units;) {
        const u64 piece = std::min(kPrefetchBytes, span.units - done);
        const u64 then = done + piece;
        const u8* ahead = payload + then;
        if (kGather)
          ahead = then < span.units ? span.cache + then
                  : following < end ? (next.cache ? next.cache : span.cache)
                                    : (beyond ? beyond : span.cache);
        else if (beyond)
          ahead = beyond + (y - begin) + done;
        const u64 lane = lane0 + (y + done) / kLaneBytes;
        u8 *at = payload + done, *cached = span.cache + done;
        // The L1 cache has too few buffers for lines under way to wait for pages that lie anywhere: gathers of pages of
        // 4 and 16 KiB were a third slower on Zen 4. Payloads are read one line after the other.
        copy_lanes(kGather ? at : cached, kGather ? cached : at, piece, lane, ahead, kGather,
                   call.sums ? &sums : nullptr);
        done = then;
      }
    } else if (kGather) {
      std::memcpy(payload, span.cache, span.units);
    } else {
      std::memcpy(span.cache, payload, span.units);
    }
    y = following;
    if (call.sums && !whole_lanes && (y - summed >= kPrefetchBytes || y == end)) {
      const u64 until = y == end ? y : y / kLaneBytes * kLaneBytes;
      add_lanes(sums, chunk.payload + summed, until - summed, lane0 + summed / kLaneBytes);
      summed = until;
    }
  }
  return sums.total();
}

// Calls part(first, last) for ranges that together cover [0, total), on up to `threads` threads.
template <typename Part>
void in_parts(u64 total, u64 threads, const Part& part) {
  const u64 parts = std::max<u64>(1, threads);
  std::vector<std::thread> others;
  u64 begun = 1;
  try {
    for (; begun < parts; ++begun) others.emplace_back(part, total * begun / parts, total * (begun + 1) / parts);
  } catch (const std::exception&) {  // out of threads or memory
  }
  part(0, total / parts);
  part(total * begun / parts, total);  // the ranges without a thread
  for (std::thread& thread : others) thread.join();
}

// Copies all chunks, in parts on up to `threads` threads; sums[c] becomes the checksum of chunk c.
template <bool kGather>
void copy(const CopyCall& call, u32 threads, std::vector<std::atomic<u64>>& sums) {
  const PagedLayout<u64> layout = call.cache.in_units<u64>(1, call.cache.planes.data());
  std::vector<u64> ends;  // of the chunks, with their payloads one after another
  u64 total = 0;
  for (std::size_t c = 0; c < call.chunks.size(); ++c) {
    const u64 bytes = call.cache.payload_bytes(call.mode, call.chunks[c]);
    ends.push_back(total += bytes);
    if (call.sums) sums[c] = checksum_length(bytes);
  }
  const bool whole_lanes = call.whole_lanes();
  const bool stream = total >= kStreamBytes;
  const auto part = [&](u64 first, u64 last) {
    for (std::size_t c = 0; c < ends.size(); ++c) {
      const u64 chunk_begin = c ? ends[c - 1] : 0;
      // Parts of one chunk meet at lane boundaries of its payload.
      const auto in_chunk = [&](u64 at) {
        return at >= ends[c]       ? ends[c] - chunk_begin
               : at <= chunk_begin ? 0
                                   : (at - chunk_begin) / kLaneBytes * kLaneBytes;
      };
      const u64 begin = in_chunk(first), end = in_chunk(last);
      if (begin == end) continue;
      const u64 sum =
          call.mode == Mode::kPage
              ? copy_part<kGather, Mode::kPage>(call, layout, call.chunks[c], begin, end, whole_lanes, stream)
              : copy_part<kGather, Mode::kToken>(call, layout, call.chunks[c], begin, end, whole_lanes, stream);
      if (call.sums) sums[c].fetch_add(sum, std::memory_order_relaxed);
    }
    if (stream) finish_streaming();
  };
  in_parts(total, std::min<u64>(threads, total / kThreadBytes), part);
}

// Like copy, but for tiles: each tile is gathered into a buffer that stays in the L1 cache and coded from there, or
// decoded into it and scattered.
template <bool kGather>
void copy_coded(const CopyCall& call, u32 threads, std::vector<std::atomic<u64>>& sums) {
  const PagedLayout<u64> layout = call.cache.in_units<u64>(1, call.cache.planes.data());
  const TileCodec& codec = simd().tile_codec;
  std::vector<u64> ends;  // of the chunks, in tiles
  u64 total = 0;
  for (std::size_t c = 0; c < call.chunks.size(); ++c) {
    const u64 planes = call.cache.planes.size(), plane_bytes = call.chunks[c].count * call.cache.page_bytes;
    ends.push_back(total += planes * tiles_of(plane_bytes));
    sums[c * kCodedSums] = checksum_length(planes * plane_bytes);
    if (kGather) sums[c * kCodedSums + 1] = checksum_length(planes * coded_plane_bytes(plane_bytes));
  }
  const bool whole_lanes = call.whole_lanes();
  const bool stream = total * kRawTileBytes >= kStreamBytes;
  const auto put_lanes = stream ? simd().lane_copy.stream : simd().lane_copy.copy;
  const auto part = [&](u64 first, u64 last) {
    alignas(64) u8 raw[kRawTileBytes], coded[kCodedTileBytes];
    for (std::size_t c = 0; c < ends.size(); ++c) {
      const u64 chunk_begin = c ? ends[c - 1] : 0;
      const u64 begin = std::max(first, chunk_begin), end = std::min(last, ends[c]);
      if (begin >= end) continue;
      Chunk chunk = call.chunks[c];
      const u64 plane_bytes = chunk.count * call.cache.page_bytes, coded_bytes = coded_plane_bytes(plane_bytes);
      const u64 lane0 = (kCodedHeaderBytes + chunk.offset / plane_bytes * coded_bytes) / kLaneBytes;
      const Divisor<u64> count(chunk.count);
      u8* const payload = chunk.payload;
      LaneSums coded_sums;
      u64 raw_sum = 0, unfit = 0;
      for (u64 tile = begin; tile < end && !unfit; ++tile) {
        const u64 plane = (tile - chunk_begin) / tiles_of(plane_bytes),
                  in_plane = (tile - chunk_begin) % tiles_of(plane_bytes);
        const u64 at = plane * plane_bytes + in_plane * kRawTileBytes;
        const u64 bytes = std::min(kRawTileBytes, plane_bytes - in_plane * kRawTileBytes);
        const u64 in_coded = plane * coded_bytes + in_plane * kCodedTileBytes;
        // Only this tile of the chunk's payload is in memory.
        chunk.payload = reinterpret_cast<u8*>(reinterpret_cast<std::uintptr_t>(raw) - at);
        const u8* beyond = payload + in_coded + coded_tile_bytes(bytes / 2);
        if (kGather) beyond = tile + 1 < end ? page_span(layout, chunk, count, at + bytes).cache : nullptr;
        if (!kGather) codec.decode(raw, payload + in_coded, static_cast<u32>(bytes / 2));
        raw_sum += copy_part<kGather, Mode::kPage>(call, layout, chunk, at, at + bytes, whole_lanes, !kGather && stream,
                                                   beyond);
        if (!kGather) continue;
        unfit = !codec.encode(coded, raw, static_cast<u32>(bytes / 2));
        put_lanes(payload + in_coded, coded, coded_tile_bytes(bytes / 2), lane0 + in_coded / kLaneBytes, coded, false,
                  &coded_sums);
      }
      sums[c * kCodedSums].fetch_add(raw_sum, std::memory_order_relaxed);
      if (kGather) sums[c * kCodedSums + 1].fetch_add(coded_sums.total(), std::memory_order_relaxed);
      if (unfit) sums[c * kCodedSums + 2].store(1, std::memory_order_relaxed);
    }
    if (stream) finish_streaming();
  };
  in_parts(total, std::min<u64>(threads, total * kRawTileBytes / kThreadBytes), part);
}

}  // namespace

void gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads) {
  check_ids(cache, mode, chunks);
  std::vector<std::atomic<u64>> sums(chunks.size());
  copy<true>({cache, mode, chunks, checksums != nullptr}, threads, sums);
  if (checksums) std::copy(sums.begin(), sums.end(), checksums);
}

void scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, u64* checksums, u32 threads) {
  check_ids(cache, mode, chunks);
  std::vector<std::atomic<u64>> sums(chunks.size());
  copy<false>({cache, mode, chunks, checksums != nullptr}, threads, sums);
  if (checksums) std::copy(sums.begin(), sums.end(), checksums);
}

void gather_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads) {
  check_ids(cache, Mode::kPage, chunks);
  std::vector<std::atomic<u64>> all(kCodedSums * chunks.size());
  copy_coded<true>({cache, Mode::kPage, chunks, true}, threads, all);
  std::copy(all.begin(), all.end(), sums);
}

void scatter_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, u64* sums, u32 threads) {
  check_ids(cache, Mode::kPage, chunks);
  std::vector<std::atomic<u64>> all(kCodedSums * chunks.size());
  copy_coded<false>({cache, Mode::kPage, chunks, true}, threads, all);
  std::copy(all.begin(), all.end(), sums);
}

u64 copy(u8* to, const u8* from, u64 bytes, u32 threads) {
  // A gather of one page with one token.
  const PagedCache cache{{const_cast<u8*>(from)}, 1, bytes, bytes, bytes, 0, 1, bytes};
  const std::int32_t page = 0;
  u64 sum = checksum_length(0);
  if (bytes) gather(cache, Mode::kPage, {{&page, 1, 1, to, false}}, &sum, threads);
  return sum;
}

}  // namespace lmc::cpu
