// Content ids and prefix keys on the GPU: the in-place overwrite, and the fused overwrite and keys in two launches.
//
// BLAKE3's leaves are 128 ids, so the hash of every prefix is a fold over subtrees of leaves that all prefixes share:
//   1. hash_leaves: a block takes 32 leaves. Three warps make content ids in shared memory, eight positions per thread
//      and step. One warp runs the 32 chains a step behind them, one per lane, and then hashes five levels of the tree
//      while the others finish the last leaf of every prefix that ends here. Four such blocks fit on an SM.
//   2. fold_keys: each block rebuilds the levels above, at most 511 nodes, in shared memory; a thread folds one key.
#include "error.h"
#include "ops.h"
#include "table.h"

namespace lmc::cuda {
namespace {

constexpr u32 kLeafIds = blake3::kLeafBytes / 8;
constexpr u32 kBlockIds = blake3::kBlockBytes / 8;
constexpr u32 kGroupLeaves = 32;  // per block of hash_leaves: one for each lane of a warp
constexpr u32 kGroupIds = kGroupLeaves * kLeafIds;
constexpr u32 kGroupLevels = 6;  // the leaves, and five levels above them
constexpr u32 kMakers = 3;       // warps of a block that make content ids, besides the one that chains
constexpr u32 kLeafThreads = (1 + kMakers) * kGroupLeaves;
constexpr u32 kSteps = (blake3::kLeafBlocks + kMakers - 1) / kMakers;
constexpr u32 kFoldThreads = 128;
constexpr u32 kOverwriteThreads = 256;
constexpr u64 kMaxIds = u64{1} << 21;  // the most that fold_keys can rebuild in 32 KiB of shared memory
constexpr u32 kNone = ~u32{0};         // no position, since positions are below kMaxIds
constexpr u32 kMaxGroups = kMaxIds / kGroupIds;
constexpr u32 kAllLanes = 0xFFFFFFFF;

// How many i in [0, count) satisfy `before`, which holds for the first ones only.
template <typename Before>
__device__ u32 count_before(u32 count, const Before& before) {
  u32 low = 0;
  while (low < count) {
    const u32 middle = (low + count) / 2;
    if (before(middle))
      low = middle + 1;
    else
      count = middle;
  }
  return low;
}

// The items of a prompt in a table, in the order of the items chain.
struct ItemsView {
  const ItemSpan* spans;
  const u64* reach;  // reach[i]: the greatest end of spans[0, i]
  const u32* chain;  // [count + 1][8]
  u32 count;

  ItemsView() = default;
  ItemsView(const ItemTable& items, Table& table) : count(static_cast<u32>(items.spans.size())) {
    std::vector<u64> reaches;
    for (const ItemSpan& item : items.spans)
      reaches.push_back(std::max(item.end, reaches.empty() ? 0 : reaches.back()));
    spans = table.append(items.spans.data(), items.spans.size());
    reach = table.append(reaches.data(), reaches.size());
    chain = table.append(items.chain.data()->data(), items.chain.size() * blake3::kKeyWords);
  }
  __device__ ItemsView(const ItemsView& items, const u8* table)
      : spans(in_table(table, items.spans)),
        reach(in_table(table, items.reach)),
        chain(in_table(table, items.chain)),
        count(items.count) {}

  // How many items begin before position `end`.
  __device__ u32 begun_before(u64 end) const {
    return count_before(count, [&](u32 i) { return spans[i].offset < end; });
  }
};

// values[k] becomes values[(k + by) % 8], by < 8, without dynamic indices, which would force it into local memory.
__device__ void rotate_left(u64 values[kBlockIds], u32 by) {
  LMC_UNROLL
  for (u32 step = 4; step > 0; step /= 2) {
    u64 rotated[kBlockIds];
    LMC_UNROLL
    for (u32 k = 0; k < kBlockIds; ++k) rotated[k] = (by & step) ? values[(k + step) % kBlockIds] : values[k];
    LMC_UNROLL
    for (u32 k = 0; k < kBlockIds; ++k) values[k] = rotated[k];
  }
}

// ids[k] = the content id of position first + k; ids[k] = 0 from position `end` on. Returns which are covered, one bit
// per position. *bad: the first position here with an id outside [0, 2^32), untouched if there is none.
__device__ u32 content_ids(TokenIds token_ids, const ItemsView& items, u64 first, u64 end, u64 ids[kBlockIds],
                           u32* bad) {
  LMC_UNROLL
  for (u32 k = kBlockIds; k-- > 0;) {
    ids[k] = first + k < end ? static_cast<u64>(token_ids[first + k]) : 0;
    if (ids[k] >= kTokenIdEnd) *bad = static_cast<u32>(first + k);
  }
  u32 covered = 0;
  const u64 block_end = first + kBlockIds < end ? first + kBlockIds : end;
  for (u32 i = items.begun_before(block_end); i-- > 0 && items.reach[i] > first;) {
    const ItemSpan& item = items.spans[i];
    const u64 from = item.offset > first ? item.offset : first;
    const u64 to = item.end < block_end ? item.end : block_end;
    const u32 shift = static_cast<u32>(first - item.offset) % kLanesPerBlock;
    for (u64 p = from; p < to;) {
      const u64 block = (p - item.offset) / kLanesPerBlock;
      const u64 lanes_end = item.offset + (block + 1) * kLanesPerBlock;
      const u64 stop = lanes_end < to ? lanes_end : to;
      u64 lanes[kLanesPerBlock];
      lane_block(lanes, item, block);
      rotate_left(lanes, shift);
      LMC_UNROLL
      for (u32 k = 0; k < kBlockIds; ++k) {
        const bool here = first + k >= p && first + k < stop;
        ids[k] += here ? lanes[k] : 0;
        covered |= static_cast<u32>(here) << k;
      }
      p = stop;
    }
  }
  LMC_UNROLL
  for (u32 k = 0; k < kBlockIds; ++k)
    if (covered >> k & 1) ids[k] |= kOverwritten;
  return covered;
}

struct Overwrite {
  i64* token_ids;
  u64 count;
  ItemsView items;
};

__global__ void __launch_bounds__(kOverwriteThreads)
    overwrite(const __grid_constant__ WithTable<Overwrite> parameters) {
  i64* token_ids = parameters.head.token_ids;
  const u64 count = parameters.head.count;
  const ItemsView items(parameters.head.items, parameters.table());
  const u64 first = (static_cast<u64>(blockIdx.x) * kOverwriteThreads + threadIdx.x) * kBlockIds;
  if (first >= count) return;
  u64 ids[kBlockIds];
  u32 bad = 0;
  const u32 covered = content_ids({token_ids, count, true}, items, first, count, ids, &bad);
  LMC_UNROLL
  for (u32 k = 0; k < kBlockIds; ++k)
    if ((covered >> k & 1) && static_cast<u64>(token_ids[first + k]) < kTokenIdEnd)
      token_ids[first + k] = static_cast<i64>(ids[k]);
}

// Cuts in ascending order: first those that are equally spaced, then those in the table.
struct Cuts {
  u64 first, step;
  u32 regular, count;
  const u32* others;

  Cuts() = default;
  Cuts(const std::vector<u64>& cuts, Table& table)
      : first(cuts[0]), step(cuts.size() > 1 ? cuts[1] - cuts[0] : 0), count(static_cast<u32>(cuts.size())) {
    for (regular = 1; regular < count && cuts[regular] == cuts[regular - 1] + step;) ++regular;
    const std::vector<u32> rest(cuts.begin() + regular, cuts.end());
    others = table.append(rest.data(), rest.size());
  }
  __device__ u64 operator[](u32 c) const { return c < regular ? first + c * step : others[c - regular]; }
};

// Shared by the two launches: items and cuts in their table, all else in device memory. Node i of level d is the
// chaining value of leaves [i 2^d, (i + 1) 2^d); the levels of hash_leaves are one after another in `nodes`.
struct Prefixes {
  TokenIds token_ids;
  u64 end;  // the last cut: ids after it are not read
  ItemsView items;
  Cuts cuts;
  u32 num_groups;
  u32 root[blake3::kKeyWords];
  u32* nodes;      // [level][node][8]
  u32* last_leaf;  // [cut][8]: the chaining value of a prefix's last leaf
  u32* first_bad;  // per warp that makes ids: the first position with an id outside [0, 2^32), or kNone
  u8* keys;

  Prefixes() = default;
  // In a kernel: the parameters, with offsets resolved to addresses.
  __device__ explicit Prefixes(const WithTable<Prefixes>& parameters) : Prefixes(parameters.head) {
    items = ItemsView(items, parameters.table());
    cuts.others = in_table(parameters.table(), cuts.others);
  }

  __device__ u32* node(u32 level, u64 i) const {
    return nodes + (static_cast<u64>(num_groups) * (64 - (64 >> level)) + i) * blake3::kKeyWords;
  }
};

// The first of `cuts` that is greater than `end`.
__device__ u32 first_cut_after(const Prefixes& prefixes, u64 end) {
  return count_before(prefixes.cuts.count, [&](u32 c) { return prefixes.cuts[c] <= end; });
}

// The least value of a warp's lanes.
__device__ u32 least_of_warp(u32 value) {
  for (u32 step = kGroupLeaves / 2; step > 0; step /= 2)
    value = at_most(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

struct LeafShared {
  // One word of padding per leaf: the lanes of a warp, one leaf each, then access different banks.
  u32 ids[kGroupLeaves][kLeafIds * 2 + 1];
  u32 running[blake3::kLeafBlocks - 1][blake3::kKeyWords][kGroupLeaves];  // [b]: the chain after block b
};

__global__ void __launch_bounds__(kLeafThreads) hash_leaves(const __grid_constant__ WithTable<Prefixes> parameters) {
  const Prefixes prefixes(parameters);
  LeafShared& shared = shared_memory<LeafShared>();
  const u64 group_first = static_cast<u64>(blockIdx.x) * kGroupIds;
  const u32 thread = threadIdx.x, lane = thread % kGroupLeaves;
  const u32 maker = thread / kGroupLeaves - 1;  // wraps around in the warp that chains

  u32 bad = kNone;
  u32 cv[blake3::kKeyWords];
#pragma unroll 1
  for (u32 step = 0; step <= kSteps; ++step) {
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kKeyWords; ++w) cv[w] = 0;  // so that it needs no registers while ids are made
    const u32 made = step * kMakers + maker;
    if (maker < kMakers && made < blake3::kLeafBlocks) {
      u64 ids[kBlockIds];
      u32 bad_here = kNone;
      const u64 first = group_first + lane * kLeafIds + made * kBlockIds;
      content_ids(prefixes.token_ids, prefixes.items, first, prefixes.end, ids, &bad_here);
      bad = at_most(bad, bad_here);
      u32* words = shared.ids[lane] + made * blake3::kBlockWords;
      LMC_UNROLL
      for (u32 k = 0; k < kBlockIds; ++k) {
        words[2 * k] = static_cast<u32>(ids[k]);
        words[2 * k + 1] = static_cast<u32>(ids[k] >> 32);
      }
    }
    if (maker >= kMakers && step > 0) {
      const u64 leaf = static_cast<u64>(blockIdx.x) * kGroupLeaves + lane;
      const u32 begin = (step - 1) * kMakers, end = at_most(begin + kMakers, blake3::kLeafBlocks);
      LMC_UNROLL
      for (u32 w = 0; w < blake3::kKeyWords; ++w)
        cv[w] = begin == 0 ? prefixes.root[w] : shared.running[begin - 1][w][lane];
#pragma unroll 1
      for (u32 b = begin; b < end; ++b) {
        const u32 flags = blake3::kKeyedHash | (b == 0 ? blake3::kLeafStart : 0) |
                          (b + 1 == blake3::kLeafBlocks ? blake3::kLeafEnd : 0);
        blake3::compress_cv(cv, cv, shared.ids[lane] + b * blake3::kBlockWords, leaf, blake3::kBlockBytes, flags);
        if (b + 1 < blake3::kLeafBlocks) {
          LMC_UNROLL
          for (u32 w = 0; w < blake3::kKeyWords; ++w) shared.running[b][w][lane] = cv[w];
        }
      }
    }
    __syncthreads();
  }

  if (thread < kGroupLeaves) {
    const u64 full_leaves = prefixes.end / kLeafIds;
#pragma unroll 1
    for (u32 level = 0; level < kGroupLevels; ++level) {
      if (level > 0) {
        u32 left[blake3::kKeyWords], right[blake3::kKeyWords];
        LMC_UNROLL
        for (u32 w = 0; w < blake3::kKeyWords; ++w) {
          left[w] = __shfl_sync(kAllLanes, cv[w], 2 * thread % kGroupLeaves);
          right[w] = __shfl_sync(kAllLanes, cv[w], (2 * thread + 1) % kGroupLeaves);
        }
        blake3::parent_cv(cv, left, right, prefixes.root, blake3::kKeyedHash);
      }
      const u64 i = (static_cast<u64>(blockIdx.x) * kGroupLeaves >> level) + thread;
      if (thread < kGroupLeaves >> level && (i + 1) << level <= full_leaves) {
        u32* node = prefixes.node(level, i);
        LMC_UNROLL
        for (u32 w = 0; w < blake3::kKeyWords; ++w) node[w] = cv[w];
      }
    }
    return;
  }

  bad = least_of_warp(bad);
  if (lane == 0) prefixes.first_bad[blockIdx.x * kMakers + maker] = bad;

  // The last leaf of each prefix that ends in this block's ids: the chain before its last 64 bytes, finished with them.
  const u32 cuts_end = first_cut_after(prefixes, group_first + kGroupIds);
#pragma unroll 1
  for (u32 c = first_cut_after(prefixes, group_first) + thread - kGroupLeaves; c < cuts_end;
       c += kLeafThreads - kGroupLeaves) {
    const u32 last = static_cast<u32>(prefixes.cuts[c] - group_first) - 1;
    const u32 leaf = last / kLeafIds, b = last % kLeafIds / kBlockIds, ids = last % kBlockIds + 1;
    u32 block[blake3::kBlockWords], out[blake3::kKeyWords];
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kBlockWords; ++w)
      block[w] = w < 2 * ids ? shared.ids[leaf][b * blake3::kBlockWords + w] : 0;
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kKeyWords; ++w) out[w] = b == 0 ? prefixes.root[w] : shared.running[b - 1][w][leaf];
    const u64 number = static_cast<u64>(blockIdx.x) * kGroupLeaves + leaf;
    const u32 flags =
        blake3::kKeyedHash | (b == 0 ? blake3::kLeafStart : 0) | blake3::kLeafEnd | (number == 0 ? blake3::kRoot : 0);
    blake3::compress_cv(out, out, block, number, 8 * ids, flags);
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kKeyWords; ++w) prefixes.last_leaf[c * blake3::kKeyWords + w] = out[w];
  }
}

struct FoldShared {
  u32 first_bad[kFoldThreads / kGroupLeaves];
  u32 nodes[2 * kMaxGroups][blake3::kKeyWords];  // one level after another, from the groups' own level on
};

__global__ void __launch_bounds__(kFoldThreads) fold_keys(const __grid_constant__ WithTable<Prefixes> parameters) {
  const Prefixes prefixes(parameters);
  FoldShared& shared = shared_memory<FoldShared>();
  const u32 thread = threadIdx.x;

  u32 bad = kNone;
  for (u32 i = thread; i < prefixes.num_groups * kMakers; i += kFoldThreads) bad = at_most(bad, prefixes.first_bad[i]);
  bad = least_of_warp(bad);
  if (thread % kGroupLeaves == 0) shared.first_bad[thread / kGroupLeaves] = bad;

  u32 nodes = static_cast<u32>(prefixes.end / kGroupIds);  // full groups, then their parents, and so on
  for (u32 i = thread; i < nodes * blake3::kKeyWords; i += kFoldThreads)
    shared.nodes[i / blake3::kKeyWords][i % blake3::kKeyWords] = prefixes.node(kGroupLevels - 1, 0)[i];
  u32 begin = 0;
  while (nodes > 1) {
    __syncthreads();
    const u32 parents = nodes / 2;
#pragma unroll 1
    for (u32 i = thread; i < parents; i += kFoldThreads)
      blake3::parent_cv(shared.nodes[begin + nodes + i], shared.nodes[begin + 2 * i], shared.nodes[begin + 2 * i + 1],
                        prefixes.root, blake3::kKeyedHash);
    begin += nodes;
    nodes = parents;
  }
  __syncthreads();

  const u32 c = blockIdx.x * kFoldThreads + thread;
  if (c >= prefixes.cuts.count) return;
  const u64 end = prefixes.cuts[c];
  u32 x[blake3::kKeyWords];
  u32 block[blake3::kBlockWords];
  if (end == 0) {
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kBlockWords; ++w) block[w] = 0;
    blake3::compress_cv(x, prefixes.root, block, 0, 0,
                        blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
  } else {
    LMC_UNROLL
    for (u32 w = 0; w < blake3::kKeyWords; ++w) x[w] = prefixes.last_leaf[c * blake3::kKeyWords + w];
    // Below kGroupLevels the subtrees are in `nodes`, above in shared memory, where level l follows the lower ones.
    const u64 leaves = (end - 1) / kLeafIds;
    u32 level_begin = 0, level_nodes = static_cast<u32>(prefixes.end / kGroupIds);
#pragma unroll 1
    for (u32 level = 0; leaves >> level != 0; ++level) {
      if (level >= kGroupLevels) {
        level_begin += level_nodes;
        level_nodes /= 2;
      }
      if ((leaves >> level & 1) == 0) continue;
      const u64 i = (leaves >> level) - 1;
      const u32* left = level < kGroupLevels ? prefixes.node(level, i) : shared.nodes[level_begin + i];
      const u32 flags = blake3::kKeyedHash | (leaves >> level == 1 ? blake3::kRoot : 0);
      blake3::parent_cv(x, left, x, prefixes.root, flags);
    }
  }
  const u32* chain = prefixes.items.chain + prefixes.items.begun_before(end) * blake3::kKeyWords;
  LMC_UNROLL
  for (u32 w = 0; w < blake3::kKeyWords; ++w) {
    block[w] = x[w];
    block[w + blake3::kKeyWords] = chain[w];
  }
  blake3::compress_cv(x, prefixes.root, block, 0, blake3::kBlockBytes,
                      blake3::kKeyedHash | blake3::kLeafStart | blake3::kLeafEnd | blake3::kRoot);
  for (const u32 first_bad : shared.first_bad) bad = at_most(bad, first_bad);
  const bool good = bad >= end;
  u32* key = reinterpret_cast<u32*>(prefixes.keys + static_cast<u64>(c) * 32);
  LMC_UNROLL
  for (u32 w = 0; w < blake3::kKeyWords; ++w) key[w] = good ? x[w] : 0;
}

// --- Host: the layout of the workspace.

u64 aligned(u64 bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void apply_mm_hashes_to_token_ids(i64* token_ids, u64 count, const ItemTable& items, const Launch& where) {
  constexpr const char* op = "apply_mm_hashes_to_token_ids";
  if (count == 0 || items.spans.empty()) return;
  const DeviceGuard guard(op, where.device);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  Table table;
  WithTable<Overwrite> parameters{{token_ids, count, ItemsView(items, table)}, nullptr, {}};
  table.put(op, where, parameters);
  const u64 ids_per_block = kOverwriteThreads * kBlockIds;
  const dim3 grid(static_cast<u32>((count + ids_per_block - 1) / ids_per_block));
  LMC_CUDA_CHECK(op, launch(overwrite, grid, dim3(kOverwriteThreads), 0, stream, parameters));
}

u64 prefix_keys_workspace_bytes(u64 count, u64 num_cuts) {
  const u64 groups = (count + kGroupIds - 1) / kGroupIds;
  return aligned(groups * kMakers * 4) + aligned(groups * 63 * 32) + num_cuts * 32;
}

void prefix_keys(TokenIds token_ids, const ItemTable& items, const u8 root[32], const std::vector<u64>& cuts, u8* keys,
                 void* workspace, const Launch& where) {
  constexpr const char* op = "prefix_keys";
  if (cuts.empty()) return;
  if (cuts.back() > kMaxIds)
    throw std::invalid_argument("cuts: expected at most " + std::to_string(kMaxIds) + " tokens on a GPU, got " +
                                std::to_string(cuts.back()));
  const DeviceGuard guard(op, where.device);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  Table table;
  WithTable<Prefixes> parameters{};
  Prefixes& prefixes = parameters.head;
  prefixes.items = ItemsView(items, table);
  prefixes.cuts = Cuts(cuts, table);
  table.put(op, where, parameters);
  prefixes.token_ids = token_ids;
  prefixes.end = cuts.back();
  prefixes.num_groups = static_cast<u32>((prefixes.end + kGroupIds - 1) / kGroupIds);
  std::memcpy(prefixes.root, root, 32);
  prefixes.keys = keys;
  u8* next = static_cast<u8*>(workspace);
  prefixes.first_bad = reinterpret_cast<u32*>(next);
  next += aligned(static_cast<u64>(prefixes.num_groups) * kMakers * 4);
  prefixes.nodes = reinterpret_cast<u32*>(next);
  next += aligned(static_cast<u64>(prefixes.num_groups) * 63 * 32);
  prefixes.last_leaf = reinterpret_cast<u32*>(next);
  if (prefixes.num_groups > 0)
    LMC_CUDA_CHECK(
        op, launch(hash_leaves, dim3(prefixes.num_groups), dim3(kLeafThreads), sizeof(LeafShared), stream, parameters));
  const dim3 grid(static_cast<u32>((cuts.size() + kFoldThreads - 1) / kFoldThreads));
  LMC_CUDA_CHECK(op, launch(fold_keys, grid, dim3(kFoldThreads), sizeof(FoldShared), stream, parameters));
}

}  // namespace lmc::cuda
