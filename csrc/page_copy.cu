// Gather and scatter of paged KV on the GPU: all planes of many chunks in one launch.
//
// A payload is cut into lanes of 16 bytes, and each lane is located in the cache by itself, whatever the runs' length,
// so that short runs keep as many bytes in flight as long ones. A thread loads four lanes before it stores any: with
// four blocks on an SM that is 64 KiB in flight. If an address or length is not a multiple of 16, a kernel for any
// layout copies units of 4 bytes or of one. Coded payloads (warp_codec.h) have kernels for whole lanes only.
#include "bulk_copy.h"
#include "error.h"
#include "ops.h"
#include "table.h"
#include "warp_codec.h"

namespace lmc::cuda {
namespace {

constexpr u32 kThreads = 256;
constexpr u32 kWarps = kThreads / kWarp;
// 32-bit indices go with units of 16 bytes and payloads up to 16 GiB: the case that has to be fast. 64-bit indices are
// for everything else. How many lanes a thread holds at once:
template <typename Index>
constexpr u32 kLanes = sizeof(Index) == 4 ? 4 : 1;
template <typename Index>
constexpr u32 kBlocksPerSm = sizeof(Index) == 4 ? 4 : 3;  // registers allow no more
template <typename Index>
constexpr u32 kTileLanes = kThreads * kLanes<Index>;
template <bool kGather>
constexpr u32 kCodedBlocksPerSm = kGather ? 2 : 3;  // each with 32 or 24 KiB in flight

// A chunk and its place among the tiles of a kernel.
template <typename Index>
struct ChunkWork {
  Chunk chunk;
  Divisor<Index> count;
  Index units;
  u64 first;      // lane of its payload, for the checksum; plane, if it is coded
  u64 tiles_end;  // of this chunk and all before it
};

// A kernel's parameters.
template <typename Index>
struct Copy {
  PagedLayout<Index> layout;       // planes: in the table
  const ChunkWork<Index>* chunks;  // in the table
  u64 tiles;
  unsigned long long* sums;  // null: no checksums
  bool partial_sums;
  u32 sums_stride;          // from one kind of partial sums to the next
  bool token_mode, gather;  // for the kernel that handles both
  bool ids_in_table;
  const u8* table;

  Copy() = default;
  // In a kernel: the parameters, with offsets resolved to addresses.
  __device__ explicit Copy(const WithTable<Copy>& parameters) : Copy(parameters.head) {
    table = parameters.table();
    layout.planes = in_table(table, layout.planes);
    chunks = in_table(table, chunks);
  }
  __device__ ChunkWork<Index> chunk(u32 c) const {
    ChunkWork<Index> work = chunks[c];
    if (ids_in_table) work.chunk.ids = in_table(table, static_cast<const u8*>(work.chunk.ids));
    return work;
  }
};
template <typename Index>
using Parameters = WithTable<Copy<Index>>;

__device__ void add_lane(LaneSums& sums, u64 index, const uint4& lane) {
  sums.add(index, lane.x | static_cast<u64>(lane.y) << 32, lane.z | static_cast<u64>(lane.w) << 32);
}

// Tells the compiler that a pointer from a table points to global memory and is not null: the load or store then needs
// no test.
template <typename T>
__device__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

template <Mode kMode, typename Index>
__device__ u8* cache_unit(const PagedLayout<Index>& layout, const Chunk& chunk, Divisor<Index> count, Index y) {
  if constexpr (kMode == Mode::kPage)
    return page_span(layout, chunk, count, y).cache;
  else
    return token_span(layout, chunk, count, y).cache;
}

// Writes a warp's part of the sum of chunk `c`. Blocks take contiguous ranges of tiles, so `block + chunk` differs for
// all pairs of a block and a chunk that it works on.
template <typename Index>
__device__ void put_sum(const Copy<Index>& copy, u32 c, u64 sum, u64 length_term) {
  sum = warp_sum(sum);
  const u32 warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp != 0) return;
  if (copy.partial_sums)
    copy.sums[(blockIdx.x + c) * kWarps + warp] = sum;
  else
    atomicAdd(copy.sums + c, sum + (warp == 0 ? length_term : 0));
}

template <typename Index>
__device__ void put_sums(const Copy<Index>& copy, u32 c, const LaneSums& sums, u64 length_term) {
  put_sum(copy, c, sums.total(), length_term);
}

// What a gather of coded payloads sums up: see kCodedSums.
struct CodedSums {
  LaneSums raw, coded;
  u32 unfit = 0;
};

__device__ void put_sums(Copy<u32> copy, u32 c, const CodedSums& sums, u64) {
  for (const u64 sum : {sums.raw.total(), sums.coded.total(), static_cast<u64>(sums.unfit)}) {
    put_sum(copy, c, sum, 0);
    copy.sums += copy.sums_stride;
  }
}

// Calls visit(chunk, c, tile, sums) for each tile of this block, which is number `tile` of chunk number `c`. What
// visits add to `sums` goes into the chunk's checksum.
template <typename Sums = LaneSums, typename Index, typename Visit>
__device__ void visit_tiles(const Copy<Index>& copy, const Visit& visit) {
  u64 tile = first_tile(blockIdx.x, copy.tiles, gridDim.x), chunk_begin = 0;
  const u64 end = first_tile(blockIdx.x + 1, copy.tiles, gridDim.x);
  for (u32 c = 0; tile < end; ++c) {
    const u64 chunk_end = copy.chunks[c].tiles_end;
    if (tile < chunk_end) {
      const ChunkWork<Index> work = copy.chunk(c);
      const u64 bytes = static_cast<u64>(work.units) * copy.layout.unit_bytes;
      const u64 length_term = tile == chunk_begin ? checksum_length(bytes) : 0;
      Sums sums;
      for (; tile < end && tile < chunk_end; ++tile) visit(work, c, static_cast<Index>(tile - chunk_begin), sums);
      if (copy.sums) put_sums(copy, c, sums, length_term);
    }
    chunk_begin = chunk_end;
  }
}

template <Mode kMode, bool kGather>
__device__ void copy_tiles(const Copy<u32>& copy) {
  visit_tiles(copy, [&copy](const ChunkWork<u32>& work, u32, u32 tile, LaneSums& sums) {
    const u32 first = tile * kTileLanes<u32>;
    uint4* payload = reinterpret_cast<uint4*>(work.chunk.payload);
    const auto in_cache = [&](u32 lane) {
      return reinterpret_cast<uint4*>(cache_unit<kMode>(copy.layout, work.chunk, work.count, lane));
    };
    uint4 lanes[kLanes<u32>];
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<u32>; ++v) {
      const u32 lane = first + threadIdx.x + v * kThreads;
      lanes[v] = make_uint4(0, 0, 0, 0);
      if (lane < work.units) {
        const uint4* from = kGather ? in_cache(lane) : payload + lane;
        if (from) lanes[v] = *in_global_memory(from);
      }
    }
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<u32>; ++v) {
      const u32 lane = first + threadIdx.x + v * kThreads;
      if (lane < work.units) {
        uint4* to = !kGather ? in_cache(lane) : payload ? payload + lane : nullptr;
        if (to) *in_global_memory(to) = lanes[v];
        if (copy.sums) add_lane(sums, work.first + lane, lanes[v]);
      }
    }
  });
}

template <Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<u32>)
    gather_kernel(const __grid_constant__ Parameters<u32> parameters) {
  copy_tiles<kMode, true>(Copy<u32>(parameters));
}

template <Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<u32>)
    scatter_kernel(const __grid_constant__ Parameters<u32> parameters) {
  copy_tiles<kMode, false>(Copy<u32>(parameters));
}

// Any layout, in units of 4 bytes or of one, in either direction and mode. Hardly any cache needs it, so it is one
// small kernel: a thread copies the units of a lane one after another.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<u64>)
    copy_units_kernel(const __grid_constant__ Parameters<u64> parameters) {
  const Copy<u64> copy(parameters);
  const u32 unit = copy.layout.unit_bytes, units = kLaneBytes / unit;
  visit_tiles(copy, [&](const ChunkWork<u64>& work, u32, u64 tile, LaneSums& sums) {
    const u64 lane = tile * kTileLanes<u64> + threadIdx.x;
    u64 low = 0, high = 0;  // the lane's bytes: shifted in from above
#pragma unroll 1
    for (u64 y = lane * units; y < (lane + 1) * units; ++y) {
      u32 value = 0;
      if (y < work.units) {
        u8* in_payload = work.chunk.payload ? work.chunk.payload + y * unit : nullptr;
        u8* in_cache = copy.token_mode ? cache_unit<Mode::kToken>(copy.layout, work.chunk, work.count, y)
                                       : cache_unit<Mode::kPage>(copy.layout, work.chunk, work.count, y);
        const u8* from = copy.gather ? in_cache : in_payload;
        u8* to = copy.gather ? in_payload : in_cache;
        if (from) value = unit == 4 ? *reinterpret_cast<const u32*>(from) : *from;
        if (to && unit == 4) *reinterpret_cast<u32*>(to) = value;
        if (to && unit == 1) *to = static_cast<u8>(value);
      }
      low = low >> 8 * unit | high << (64 - 8 * unit);
      high = high >> 8 * unit | static_cast<u64>(value) << (64 - 8 * unit);
    }
    if (copy.sums && lane * units < work.units) sums.add(work.first + lane, low, high);
  });
}

// --- Coded payloads: a warp works on a tile of the codec, and a tile of a block is as many of a chunk's as it has
// warps.

// A warp's part of a block's tile number `tile`, in lanes.
struct CodedTile {
  u32 lanes;                   // of the raw tile; 0: the chunk has no such tile
  u32 raw, coded;              // where it begins in the chunk's raw payload and in its coded tiles
  u32 raw_begin, coded_begin;  // where those begin in their checksums

  __device__ CodedTile(const Copy<u32>& copy, const ChunkWork<u32>& work, u32 tile) {
    const u32 plane_lanes = static_cast<u32>(work.chunk.count) * copy.layout.page.d;
    const u32 coded_lanes = static_cast<u32>(coded_plane_bytes(u64{plane_lanes} * kLaneBytes) / kLaneBytes);
    const u32 per_plane = (plane_lanes + kRawLanes - 1) / kRawLanes, number = tile * kWarps + threadIdx.x / kWarp;
    const u32 plane = number / per_plane, in_plane = number % per_plane;
    raw = plane * plane_lanes + in_plane * kRawLanes;
    coded = plane * coded_lanes + in_plane * static_cast<u32>(kCodedTileBytes / kLaneBytes);
    lanes = plane * plane_lanes < work.units ? at_most(plane_lanes - in_plane * kRawLanes, kRawLanes) : 0;
    raw_begin = static_cast<u32>(work.first) * plane_lanes;
    coded_begin = kCodedHeaderBytes / kLaneBytes + static_cast<u32>(work.first) * coded_lanes;
  }
};

struct BlockScratch {
  CodecScratch warps[kWarps];
};

__device__ uint4* in_pages(const Copy<u32>& copy, const ChunkWork<u32>& work, u32 lane) {
  return reinterpret_cast<uint4*>(cache_unit<Mode::kPage>(copy.layout, work.chunk, work.count, lane));
}

__global__ void __launch_bounds__(kThreads, kCodedBlocksPerSm<true>)
    gather_coded_kernel(const __grid_constant__ Parameters<u32> parameters) {
  const Copy<u32> copy(parameters);
  const u32 thread = threadIdx.x % kWarp;
  CodecScratch& scratch = shared_memory<BlockScratch>().warps[threadIdx.x / kWarp];
  visit_tiles<CodedSums>(copy, [&](const ChunkWork<u32>& work, u32, u32 number, CodedSums& sums) {
    const CodedTile tile(copy, work, number);
    if (tile.lanes == 0) return;
    uint4 raw[kThreadLanes];
    LMC_UNROLL
    for (u32 v = 0; v < kThreadLanes; ++v) {
      const u32 lane = thread + v * kWarp;
      raw[v] = make_uint4(0, 0, 0, 0);
      if (lane < tile.lanes)
        if (const uint4* from = in_pages(copy, work, tile.raw + lane)) raw[v] = *in_global_memory(from);
    }
    LMC_UNROLL
    for (u32 v = 0; v < kThreadLanes; ++v) {
      const u32 lane = thread + v * kWarp;
      if (lane < tile.lanes) add_lane(sums.raw, tile.raw_begin + tile.raw + lane, raw[v]);
    }
    uint4* const to = in_global_memory(reinterpret_cast<uint4*>(work.chunk.payload) + tile.coded);
    const bool fits = encode_tile(raw, tile.lanes, scratch, [&](u32 i, const uint4& lane) {
      to[i] = lane;
      add_lane(sums.coded, tile.coded_begin + tile.coded + i, lane);
    });
    if (!fits) ++sums.unfit;
  });
}

__global__ void __launch_bounds__(kThreads, kCodedBlocksPerSm<false>)
    scatter_coded_kernel(const __grid_constant__ Parameters<u32> parameters) {
  const Copy<u32> copy(parameters);
  const u32 thread = threadIdx.x % kWarp;
  visit_tiles(copy, [&](const ChunkWork<u32>& work, u32, u32 number, LaneSums& sums) {
    const CodedTile tile(copy, work, number);
    if (tile.lanes == 0) return;
    const uint4* const from = in_global_memory(reinterpret_cast<const uint4*>(work.chunk.payload) + tile.coded);
    uint4 raw[kThreadLanes];
    decode_tile(raw, tile.lanes, *reinterpret_cast<const TileHead*>(from), [&](u32 i) { return from[i]; });
    LMC_UNROLL
    for (u32 v = 0; v < kThreadLanes; ++v) {
      const u32 lane = thread + v * kWarp;
      if (lane < tile.lanes) {
        if (uint4* to = in_pages(copy, work, tile.raw + lane)) *in_global_memory(to) = raw[v];
        add_lane(sums, tile.raw_begin + tile.raw + lane, raw[v]);
      }
    }
  });
}

// --- Copies between pages and host memory by the bulk copy engine, through a ring of tiles in shared memory: so a few
// blocks fill the bus, which loads by their threads would not. Warp kWarps moves tiles into the ring and, some tiles
// later, out of it; the other warps compute checksums.

constexpr u32 kStages = 6;  // 96 KiB: available to a block on every GPU that has the engine
constexpr u32 kAhead = 4;   // tiles on their way into the ring; the other stages' tiles are on their way out
constexpr u32 kBulkThreads = kThreads + kWarp;
constexpr u64 kLeastBulkRun = 128;  // bytes; shorter runs are left to threads
static_assert(kAhead < kStages, "a tile leaves its stage before the next one arrives");

struct TileRing {
  uint4 tiles[kStages][kTileLanes<u32>];
  BulkBarrier filled[kStages], summed[kStages];
  struct {
    u32 chunk, first;
  } places[kStages];  // of the tile in a stage
};

// Calls visit(cache, at, lanes) for each contiguous piece of a tile's cache, `at` lanes after the tile's first; cache
// is null where there is no page. The lanes of a warp share the runs among them. Pages consist of whole runs, so runs
// begin at multiples of their length in a payload too.
template <typename Visit>
__device__ void visit_pieces(const Copy<u32>& copy, const ChunkWork<u32>& work, u32 first, const Visit& visit) {
  const Divisor<u32> run = copy.layout.run;
  const u32 end = at_most(work.units, first + kTileLanes<u32>), runs_end = run.divide(end - 1) + 1;
  for (u32 r = run.divide(first) + threadIdx.x % kWarp; r < runs_end; r += kWarp) {
    const u32 stop = at_most(end, (r + 1) * run.d);
    for (u32 y = r * run.d < first ? first : r * run.d; y < stop;) {
      const Span<u32> span = page_span(copy.layout, work.chunk, work.count, y);
      const u32 lanes = at_most(span.units, stop - y);
      visit(span.cache, y - first, lanes);
      y += lanes;
    }
  }
}

template <bool kGather>
__device__ void fill_stage(const Copy<u32>& copy, const ChunkWork<u32>& work, u32 first, uint4* tile,
                           BulkBarrier& filled) {
  if (kGather) {
    bool zeros = false;
    visit_pieces(copy, work, first, [&](const u8* cache, u32 at, u32 lanes) {
      if (cache) return filled.load(tile + at, cache, lanes * kLaneBytes);
      for (u32 i = 0; i < lanes; ++i) tile[at + i] = make_uint4(0, 0, 0, 0);
      zeros = true;
    });
    if (zeros) fence_for_bulk_copies();
  } else if (threadIdx.x % kWarp == 0) {
    const u32 lanes = at_most(work.units - first, kTileLanes<u32>);
    filled.load(tile, work.chunk.payload + static_cast<u64>(first) * kLaneBytes, lanes * kLaneBytes);
  }
  filled.arrive();
}

template <bool kGather>
__device__ void empty_stage(const Copy<u32>& copy, const ChunkWork<u32>& work, u32 first, const uint4* tile) {
  if (!kGather) {
    visit_pieces(copy, work, first, [&](u8* cache, u32 at, u32 lanes) {
      if (cache) bulk_store(cache, tile + at, lanes * kLaneBytes);
    });
  } else if (threadIdx.x % kWarp == 0) {
    const u32 lanes = at_most(work.units - first, kTileLanes<u32>);
    bulk_store(work.chunk.payload + static_cast<u64>(first) * kLaneBytes, tile, lanes * kLaneBytes);
  }
  commit_bulk_stores();
}

template <bool kGather>
__device__ void move_tiles(const Copy<u32>& copy, TileRing& ring) {
  Copy<u32> no_sums = copy;
  no_sums.sums = nullptr;
  u32 begun = 0, moved = 0;
  const auto move_out = [&] {
    const u32 stage = moved % kStages;
    ring.filled[stage].wait(moved / kStages);
    empty_stage<kGather>(copy, copy.chunk(ring.places[stage].chunk), ring.places[stage].first, ring.tiles[stage]);
    ++moved;
  };
  visit_tiles(no_sums, [&](const ChunkWork<u32>& work, u32 c, u32 tile, LaneSums&) {
    const u32 first = tile * kTileLanes<u32>;
    const u32 stage = begun % kStages;
    if (begun >= kAhead) move_out();
    if (begun >= kStages) {
      wait_for_bulk_reads<kStages - kAhead>();
      if (copy.sums) ring.summed[stage].wait(begun / kStages - 1);
      __syncwarp();
    }
    if (threadIdx.x % kWarp == 0) ring.places[stage] = {c, first};
    fill_stage<kGather>(copy, work, first, ring.tiles[stage], ring.filled[stage]);
    ++begun;
  });
  while (moved < begun) move_out();
  wait_for_bulk_stores();
}

template <bool kGather>
__device__ void copy_by_bulk(const Parameters<u32>& parameters) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Copy<u32> copy(parameters);
  TileRing& ring = shared_memory<TileRing>();
  if (threadIdx.x == 0)
    for (u32 stage = 0; stage < kStages; ++stage) {
      ring.filled[stage].init(kWarp);
      ring.summed[stage].init(kWarps);
    }
  __syncthreads();
  if (threadIdx.x >= kThreads) return move_tiles<kGather>(copy, ring);
  if (!copy.sums) return;
  u32 n = 0;
  visit_tiles(copy, [&](const ChunkWork<u32>& work, u32, u32 tile, LaneSums& sums) {
    const u32 first = tile * kTileLanes<u32>;
    const u32 stage = n % kStages;
    ring.filled[stage].wait(n / kStages);
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<u32>; ++v) {
      const u32 in_tile = threadIdx.x + v * kThreads;
      if (first + in_tile < work.units) add_lane(sums, work.first + first + in_tile, ring.tiles[stage][in_tile]);
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ring.summed[stage].arrive();
    ++n;
  });
#endif
}

__global__ void __launch_bounds__(kBulkThreads, 1)
    gather_bulk_kernel(const __grid_constant__ Parameters<u32> parameters) {
  copy_by_bulk<true>(parameters);
}

__global__ void __launch_bounds__(kBulkThreads, 1)
    scatter_bulk_kernel(const __grid_constant__ Parameters<u32> parameters) {
  copy_by_bulk<false>(parameters);
}

// --- Host

struct Call {
  const char* op;
  bool is_gather, coded;
  const PagedCache& cache;
  Mode mode;
  const std::vector<Chunk>& chunks;
  bool host_ids;
  const Launch& where;

  u32 blocks_per_sm(u32 of_raw) const {
    return !coded ? of_raw : is_gather ? kCodedBlocksPerSm<true> : kCodedBlocksPerSm<false>;
  }
  u32 sums_per_chunk() const { return coded && is_gather ? kCodedSums : 1; }

  // The widest unit that divides every address, stride and length of the call.
  u32 unit() const {
    u64 all = cache.page_stride | cache.run_stride | cache.run_bytes;
    for (const u8* plane : cache.planes) all |= reinterpret_cast<u64>(plane);
    u64 most = cache.page_bytes;
    for (const Chunk& chunk : chunks) {
      all |= reinterpret_cast<u64>(chunk.payload);
      most = std::max(most, cache.payload_bytes(mode, chunk));
      if (coded)
        most = std::max(most, chunk.offset + cache.planes.size() * coded_plane_bytes(chunk.count * cache.page_bytes));
      if (cache.splits_pages(mode, chunk)) all |= cache.token_bytes;
    }
    if (all % 16 == 0 && most / 16 < (u64{1} << Divisor<u32>::kBits) - kTileLanes<u32>) return 16;
    return all % 4 == 0 ? 4 : 1;
  }
};

// Whether the bulk copy engine can do this call and pays. The code chosen for this device may be older than the device,
// and then does not use the engine.
bool takes_bulk_copies(const Call& call) {
  if (!call.where.payloads_on_host || call.coded || call.mode != Mode::kPage || call.cache.run_bytes < kLeastBulkRun)
    return false;
  cudaFuncAttributes code{};
  LMC_CUDA_CHECK(call.op, cudaFuncGetAttributes(&code, scatter_bulk_kernel));
  return code.ptxVersion >= 90;
}

// The chunks of a call that one kernel copies.
template <typename Index>
struct Part {
  Parameters<Index> parameters{};
  Table table;
  std::vector<ChunkWork<Index>> works;
  u64 blocks, first_sum;

  u64 tiles() const { return works.back().tiles_end; }
  u64 sums_stride() const { return (blocks + works.size()) * kWarps; }
  // length: which the checksum of chunk c of this kind has.
  PartialSums::Range sums_of(u64 c, u64 kind, u64 length) const {
    const u64 begin = c ? works[c - 1].tiles_end : 0, end = works[c].tiles_end;
    if (begin == end) return {0, 0, 0};
    const u64 first_block = block_of_tile(begin, tiles(), blocks), last_block = block_of_tile(end - 1, tiles(), blocks);
    const u64 sum = first_sum + kind * sums_stride();
    return {sum + (first_block + c) * kWarps, sum + (last_block + c + 1) * kWarps, checksum_length(length)};
  }
};

// The chunks from `first` on that fit into the parameters, at least one.
template <typename Index>
Part<Index> part_from(const Call& call, u32 unit, std::size_t first) {
  Part<Index> part{};
  u8* const* planes = part.table.append(call.cache.planes.data(), call.cache.planes.size());
  const u64 ids_end = call.cache.num_pages * (call.mode == Mode::kPage ? 1 : call.cache.page_tokens);
  const bool wide = ids_end > INT32_MAX;
  u64 tiles = 0;
  for (std::size_t i = first; i < call.chunks.size(); ++i) {
    Chunk chunk = call.chunks[i];
    const u64 more = (call.host_ids ? chunk.count * (wide ? 8 : 4) + 15 : 0) + (i - first + 1) * sizeof part.works[0];
    if (i > first && part.table.bytes_after(more) > sizeof part.parameters.bytes) break;
    if (call.host_ids) {
      std::vector<i64> ids;
      for (u64 k = 0; k < chunk.count; ++k) ids.push_back(chunk.id(k) < ids_end ? static_cast<i64>(chunk.id(k)) : -1);
      const std::vector<std::int32_t> narrow(ids.begin(), ids.end());
      chunk.wide = wide;
      chunk.ids = part.table.append(narrow.data(), wide ? 0 : narrow.size());
      if (wide) chunk.ids = part.table.append(ids.data(), ids.size());
    }
    const u64 bytes = call.cache.payload_bytes(call.mode, chunk), tile_bytes = kTileLanes<Index> * kLaneBytes;
    const u64 plane_bytes = chunk.count * call.cache.page_bytes;
    tiles += call.coded ? (call.cache.planes.size() * tiles_of(plane_bytes) + kWarps - 1) / kWarps
                        : (bytes + tile_bytes - 1) / tile_bytes;
    part.works.push_back({chunk, Divisor<Index>(chunk.count ? chunk.count : 1), static_cast<Index>(bytes / unit),
                          chunk.offset / (call.coded && plane_bytes ? plane_bytes : kLaneBytes), tiles});
  }
  Copy<Index>& copy = part.parameters.head;
  copy.layout = call.cache.in_units<Index>(unit, planes);
  copy.chunks = part.table.append(part.works.data(), part.works.size());
  copy.ids_in_table = call.host_ids;
  copy.token_mode = call.mode == Mode::kToken;
  copy.gather = call.is_gather;
  copy.tiles = tiles;
  return part;
}

void launch_part(const Call& call, const Part<u64>& part) {
  LMC_CUDA_CHECK(call.op, launch(copy_units_kernel, dim3(static_cast<u32>(part.blocks)), dim3(kThreads), 0,
                                 static_cast<cudaStream_t>(call.where.stream), part.parameters));
}

void launch_part(const Call& call, const Part<u32>& part) {
  const bool bulk = takes_bulk_copies(call);
  void (*kernel)(Parameters<u32>) = call.coded ? (call.is_gather ? gather_coded_kernel : scatter_coded_kernel)
                                    : bulk     ? (call.is_gather ? gather_bulk_kernel : scatter_bulk_kernel)
                                    : call.mode == Mode::kPage
                                        ? (call.is_gather ? gather_kernel<Mode::kPage> : scatter_kernel<Mode::kPage>)
                                        : (call.is_gather ? gather_kernel<Mode::kToken> : scatter_kernel<Mode::kToken>);
  constexpr int ring_bytes = sizeof(TileRing);
  if (bulk)
    LMC_CUDA_CHECK(call.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes));
  LMC_CUDA_CHECK(call.op, launch(kernel, dim3(static_cast<u32>(part.blocks)), dim3(bulk ? kBulkThreads : kThreads),
                                 bulk                           ? ring_bytes
                                 : call.coded && call.is_gather ? sizeof(BlockScratch)
                                                                : 0,
                                 static_cast<cudaStream_t>(call.where.stream), part.parameters));
}

// checksums: device memory, one per chunk, or null.
template <typename Index>
PartialSums run(const Call& call, u32 unit, u64* checksums) {
  const char* op = call.op;
  int multiprocessors = 0;
  LMC_CUDA_CHECK(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, call.where.device));
  u64 most_blocks = static_cast<u64>(call.blocks_per_sm(kBlocksPerSm<Index>)) * static_cast<u32>(multiprocessors);
  if (call.where.max_blocks) most_blocks = std::min<u64>(most_blocks, call.where.max_blocks);
  std::vector<Part<Index>> parts;
  PartialSums partial;
  u64 num_sums = 0;
  for (std::size_t first = 0; first < call.chunks.size(); first += parts.back().works.size()) {
    parts.push_back(part_from<Index>(call, unit, first));
    Part<Index>& part = parts.back();
    part.blocks = std::min(part.tiles(), most_blocks);
    part.first_sum = num_sums;
    num_sums += part.sums_stride() * call.sums_per_chunk();
    for (u64 c = 0; c < part.works.size(); ++c) {
      const Chunk& chunk = part.works[c].chunk;
      const u64 coded = call.cache.planes.size() * coded_plane_bytes(chunk.count * call.cache.page_bytes);
      const u64 lengths[kCodedSums] = {call.cache.payload_bytes(call.mode, chunk), coded, 0};
      for (u64 kind = 0; kind < call.sums_per_chunk(); ++kind)
        partial.ranges.push_back(part.sums_of(c, kind, lengths[kind]));
    }
  }
  const bool are_partial = static_cast<bool>(call.where.partial_sums);
  u64* sums = are_partial ? call.where.partial_sums(num_sums) : checksums;
  const auto stream = static_cast<cudaStream_t>(call.where.stream);
  if (sums && !are_partial) LMC_CUDA_CHECK(op, cudaMemsetAsync(sums, 0, 8 * call.chunks.size(), stream));
  std::size_t first = 0;
  for (Part<Index>& part : parts) {
    part.parameters.head.partial_sums = are_partial;
    part.parameters.head.sums_stride = static_cast<u32>(part.sums_stride());
    if (sums)
      part.parameters.head.sums = reinterpret_cast<unsigned long long*>(sums) + (are_partial ? part.first_sum : first);
    first += part.works.size();
    if (part.tiles() == 0) continue;
    part.table.put(op, call.where, part.parameters);
    launch_part(call, part);
  }
  return partial;
}

PartialSums run(const Call& call, u64* checksums) {
  if (call.chunks.empty()) return {};
  const DeviceGuard guard(call.op, call.where.device);
  const u32 unit = call.unit();
  if (call.coded && unit != kLaneBytes)
    throw std::invalid_argument(std::string(call.op) +
                                ": expected pages, tokens and payloads of whole lanes of 16 bytes");
  return unit == 16 ? run<u32>(call, unit, checksums) : run<u64>(call, unit, checksums);
}

}  // namespace

PartialSums gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                   const Launch& where) {
  const char* op = mode == Mode::kPage ? "gather_pages" : "gather_tokens";
  return run({op, true, false, cache, mode, chunks, host_ids, where}, checksums);
}

PartialSums scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                    const Launch& where) {
  const char* op = mode == Mode::kPage ? "scatter_pages" : "scatter_tokens";
  return run({op, false, false, cache, mode, chunks, host_ids, where}, checksums);
}

PartialSums gather_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, bool host_ids,
                         const Launch& where) {
  return run({"gather_coded", true, true, cache, Mode::kPage, chunks, host_ids, where}, nullptr);
}

PartialSums scatter_coded(const PagedCache& cache, const std::vector<Chunk>& chunks, bool host_ids,
                          const Launch& where) {
  return run({"scatter_coded", false, true, cache, Mode::kPage, chunks, host_ids, where}, nullptr);
}

void load_page_copies(const char* op) {
  cudaFuncAttributes loaded{};
  const auto load = [&](const auto&... kernels) {
    for (const cudaError_t error : {cudaFuncGetAttributes(&loaded, kernels)...}) LMC_CUDA_CHECK(op, error);
  };
  load(gather_kernel<Mode::kPage>, scatter_kernel<Mode::kPage>, gather_bulk_kernel, scatter_bulk_kernel);
  load(copy_units_kernel, gather_coded_kernel, scatter_coded_kernel);
}

int device_count(std::string& why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  why = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  return 0;
}

}  // namespace lmc::cuda
