// Gather and scatter of paged KV on the GPU: all planes of many chunks in one launch.
//
// A payload is cut into lanes of 16 bytes and each lane is found in the cache by itself, whatever the runs' length, so
// that short runs keep as many bytes in flight as long ones. A thread loads four lanes before it stores any: with four
// blocks on an SM that is 64 KiB in flight. Lanes are copied in units of 16 bytes where all addresses and lengths allow
// it, else of 4 or 1.
#include "bulk_copy.h"
#include "error.h"
#include "ops.h"
#include "table.h"

namespace lmc::cuda {
namespace {

constexpr u32 kThreads = 256;
// How many lanes a thread holds at once, and how many blocks an SM; narrow units need registers for their addresses.
template <u32 kUnit>
constexpr u32 kLanes = kUnit == 16 ? 4 : 1;
template <u32 kUnit>
constexpr u32 kBlocksPerSm = kUnit == 1 ? 2 : 4;
template <u32 kUnit>
constexpr u32 kTileLanes = kThreads * kLanes<kUnit>;
constexpr u32 kWarp = 32, kWarps = kThreads / kWarp;
constexpr u32 kAllLanes = 0xFFFFFFFF;

// The index type of a unit: 32 bits serve payloads of up to 16 GiB in units of 16 bytes, the case that has to be fast.
template <u32 kUnit>
struct IndexOf {
  using type = u64;
};
template <>
struct IndexOf<16> {
  using type = u32;
};

template <u32 kUnit>
struct Unit;
template <>
struct Unit<16> {
  using type = uint4;
};
template <>
struct Unit<4> {
  using type = u32;
};
template <>
struct Unit<1> {
  using type = u8;
};

// A chunk and its place among the tiles of a kernel.
template <typename Index>
struct ChunkWork {
  Chunk chunk;
  Divisor<Index> count;
  Index units;
  u64 first_lane;  // of its payload, for the checksum
  u64 tiles_end;   // of this chunk and all before it
};

// What a kernel is told.
template <typename Index>
struct Copy {
  PagedLayout<Index> layout;       // planes: in the table
  const ChunkWork<Index>* chunks;  // in the table
  u64 tiles;
  unsigned long long* sums;  // null: none are made
  bool partial_sums;
  bool ids_in_table;
  const u8* table;

  Copy() = default;
  // In a kernel: as the parameters say, with addresses.
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
template <u32 kUnit>
using Parameters = WithTable<Copy<typename IndexOf<kUnit>::type>>;

// 16 bytes of a payload, or the last of it, in registers.
union Lane {
  uint4 vector;
  u32 words[4];
};

template <u32 kUnit>
__device__ void put_unit(Lane& lane, u32 k, typename Unit<kUnit>::type unit) {
  if constexpr (kUnit == 16)
    lane.vector = unit;
  else if constexpr (kUnit == 4)
    lane.words[k] = unit;
  else
    lane.words[k / 4] |= static_cast<u32>(unit) << (k % 4 * 8);
}

template <u32 kUnit>
__device__ typename Unit<kUnit>::type get_unit(const Lane& lane, u32 k) {
  if constexpr (kUnit == 16)
    return lane.vector;
  else if constexpr (kUnit == 4)
    return lane.words[k];
  else
    return static_cast<u8>(lane.words[k / 4] >> (k % 4 * 8));
}

__device__ void add_lane(LaneSums& sums, u64 index, const Lane& lane) {
  sums.add(index, lane.words[0] | static_cast<u64>(lane.words[1]) << 32,
           lane.words[2] | static_cast<u64>(lane.words[3]) << 32);
}

// A lane of the payload. `units`: how many the payload has; `vector`: it begins at a multiple of 16.
template <u32 kUnit, typename Index>
__device__ Lane load_payload(const u8* payload, bool vector, Index lane_index, Index units) {
  constexpr u32 kUnits = kLaneBytes / kUnit;
  Lane lane;
  lane.vector = make_uint4(0, 0, 0, 0);
  if ((kUnit == kLaneBytes || vector) && (lane_index + 1) * kUnits <= units) {
    lane.vector = reinterpret_cast<const uint4*>(payload)[lane_index];
  } else {
    LMC_UNROLL
    for (u32 k = 0; k < kUnits; ++k) {
      const Index y = lane_index * kUnits + k;
      if (y < units) put_unit<kUnit>(lane, k, reinterpret_cast<const typename Unit<kUnit>::type*>(payload)[y]);
    }
  }
  return lane;
}

template <u32 kUnit, typename Index>
__device__ void store_payload(u8* payload, bool vector, Index lane_index, Index units, const Lane& lane) {
  constexpr u32 kUnits = kLaneBytes / kUnit;
  if ((kUnit == kLaneBytes || vector) && (lane_index + 1) * kUnits <= units) {
    reinterpret_cast<uint4*>(payload)[lane_index] = lane.vector;
  } else {
    LMC_UNROLL
    for (u32 k = 0; k < kUnits; ++k) {
      const Index y = lane_index * kUnits + k;
      if (y < units) reinterpret_cast<typename Unit<kUnit>::type*>(payload)[y] = get_unit<kUnit>(lane, k);
    }
  }
}

// Tells the compiler that a pointer out of a table is one to global memory: the load or store then needs no test of it.
template <typename T>
__device__ T* in_global_memory(T* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

template <Mode kMode, typename Index>
__device__ u8* cache_unit(const PagedLayout<Index>& layout, const Chunk& chunk, Divisor<Index> count, Index y) {
  if constexpr (kMode == Mode::kPage)
    return page_span(layout, chunk, count, y).cache;
  else
    return token_span(layout, chunk, count, y).cache;
}

// Hands over what a warp has summed of chunk `c`. Blocks take contiguous ranges of tiles, so that no other pair of
// block and chunk that meet has the same `block + chunk`.
template <typename Index>
__device__ void put_sum(const Copy<Index>& copy, u32 c, u64 sum, u64 length_term) {
  for (u32 step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  const u32 warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp != 0) return;
  if (copy.partial_sums)
    copy.sums[(blockIdx.x + c) * kWarps + warp] = sum;
  else
    atomicAdd(copy.sums + c, sum + (warp == 0 ? length_term : 0));
}

// Calls visit(chunk, first, sums) for each tile of this block: `first` is the tile's first lane in its chunk's payload,
// and what visits add to `sums` goes to the chunk's checksum.
template <u32 kUnit, typename Index, typename Visit>
__device__ void visit_tiles(const Copy<Index>& copy, const Visit& visit) {
  u64 tile = first_tile(blockIdx.x, copy.tiles, gridDim.x), chunk_begin = 0;
  const u64 end = first_tile(blockIdx.x + 1, copy.tiles, gridDim.x);
  for (u32 c = 0; tile < end; ++c) {
    const u64 chunk_end = copy.chunks[c].tiles_end;
    if (tile < chunk_end) {
      const ChunkWork<Index> work = copy.chunk(c);
      const u64 length_term = tile == chunk_begin ? checksum_length(static_cast<u64>(work.units) * kUnit) : 0;
      LaneSums sums;
      for (; tile < end && tile < chunk_end; ++tile)
        visit(work, static_cast<Index>((tile - chunk_begin) * kTileLanes<kUnit>), sums);
      if (copy.sums) put_sum(copy, c, sums.total(), length_term);
    }
    chunk_begin = chunk_end;
  }
}

template <Mode kMode, bool kGather, u32 kUnit>
__device__ void copy_tiles(const Parameters<kUnit>& parameters) {
  using Index = typename IndexOf<kUnit>::type;
  using Piece = typename Unit<kUnit>::type;
  constexpr u32 kUnits = kLaneBytes / kUnit;
  const Copy<Index> copy(parameters);
  visit_tiles<kUnit>(copy, [&copy](const ChunkWork<Index>& work, Index first, LaneSums& sums) {
    u8* payload = work.chunk.payload;
    const bool vector = reinterpret_cast<std::uintptr_t>(payload) % kLaneBytes == 0;
    Lane lanes[kLanes<kUnit>];
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<kUnit>; ++v) {
      const Index lane = first + threadIdx.x + v * kThreads;
      if constexpr (kGather) {
        lanes[v].vector = make_uint4(0, 0, 0, 0);
        LMC_UNROLL
        for (u32 k = 0; k < kUnits; ++k) {
          const Index y = lane * kUnits + k;
          const u8* from = y < work.units ? cache_unit<kMode>(copy.layout, work.chunk, work.count, y) : nullptr;
          if (from) put_unit<kUnit>(lanes[v], k, *in_global_memory(reinterpret_cast<const Piece*>(from)));
        }
      } else {
        lanes[v] = load_payload<kUnit>(in_global_memory(payload), vector, lane, work.units);
      }
    }
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<kUnit>; ++v) {
      const Index lane = first + threadIdx.x + v * kThreads;
      if constexpr (kGather) {
        if (payload) store_payload<kUnit>(in_global_memory(payload), vector, lane, work.units, lanes[v]);
      } else {
        LMC_UNROLL
        for (u32 k = 0; k < kUnits; ++k) {
          const Index y = lane * kUnits + k;
          u8* to = y < work.units ? cache_unit<kMode>(copy.layout, work.chunk, work.count, y) : nullptr;
          if (to) *in_global_memory(reinterpret_cast<Piece*>(to)) = get_unit<kUnit>(lanes[v], k);
        }
      }
      if (copy.sums && lane * kUnits < work.units) add_lane(sums, work.first_lane + lane, lanes[v]);
    }
  });
}

template <Mode kMode, u32 kUnit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kUnit>)
    gather_kernel(const __grid_constant__ Parameters<kUnit> parameters) {
  copy_tiles<kMode, true, kUnit>(parameters);
}

template <Mode kMode, u32 kUnit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kUnit>)
    scatter_kernel(const __grid_constant__ Parameters<kUnit> parameters) {
  copy_tiles<kMode, false, kUnit>(parameters);
}

// A ring of tiles of payload in shared memory.
constexpr u32 kStages = 4;
struct TileRing {
  uint4 tiles[kStages][kTileLanes<16>];
  BulkBarrier filled[kStages];
};

// One thread: begins to fill a stage with a tile. `c`: the chunk of an earlier tile, then of this one.
__device__ void fill_stage(const Copy<u32>& copy, TileRing& ring, u32 stage, u64 tile, u32& c) {
  while (copy.chunks[c].tiles_end <= tile) ++c;
  const ChunkWork<u32>& work = copy.chunks[c];
  const u32 first = static_cast<u32>(tile - (c ? copy.chunks[c - 1].tiles_end : 0)) * kTileLanes<16>;
  const u32 lanes = at_most(work.units - first, kTileLanes<16>);
  ring.filled[stage].begin_copy(ring.tiles[stage], work.chunk.payload + static_cast<u64>(first) * kLaneBytes,
                                lanes * kLaneBytes);
}

// As scatter_kernel<Mode::kPage, 16>, for payloads in host memory, and for few blocks: the bulk copy engine keeps up to
// 64 KiB a block on the bus, which loads by threads do not.
__global__ void __launch_bounds__(kThreads) scatter_bulk_kernel(const __grid_constant__ Parameters<16> parameters) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Copy<u32> copy(parameters);
  TileRing& ring = shared_memory<TileRing>();
  const u64 begin = first_tile(blockIdx.x, copy.tiles, gridDim.x),
            end = first_tile(blockIdx.x + 1, copy.tiles, gridDim.x);
  u32 ahead = 0;  // the chunk of the tile that is filled next
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < kStages; ++stage) ring.filled[stage].init();
    for (u32 stage = 0; stage < kStages && begin + stage < end; ++stage)
      fill_stage(copy, ring, stage, begin + stage, ahead);
  }
  __syncthreads();
  u64 tile = begin;
  visit_tiles<16>(copy, [&](const ChunkWork<u32>& work, u32 first, LaneSums& sums) {
    const u32 stage = static_cast<u32>((tile - begin) % kStages);
    ring.filled[stage].wait(static_cast<u32>((tile - begin) / kStages));
    LMC_UNROLL
    for (u32 v = 0; v < kLanes<16>; ++v) {
      const u32 in_tile = threadIdx.x + v * kThreads, lane_index = first + in_tile;
      if (lane_index < work.units) {
        Lane lane;
        lane.vector = ring.tiles[stage][in_tile];
        u8* to = cache_unit<Mode::kPage>(copy.layout, work.chunk, work.count, lane_index);
        if (to) *in_global_memory(reinterpret_cast<uint4*>(to)) = lane.vector;
        if (copy.sums) add_lane(sums, work.first_lane + lane_index, lane);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && tile + kStages < end) fill_stage(copy, ring, stage, tile + kStages, ahead);
    ++tile;
  });
#endif
}

// --- Host

struct Call {
  const char* op;
  const PagedCache& cache;
  Mode mode;
  const std::vector<Chunk>& chunks;
  bool host_ids;
  const Launch& where;

  // The widest unit that divides every address, stride and length the call can meet.
  u32 unit() const {
    u64 all = cache.page_stride | cache.run_stride | cache.run_bytes;
    for (const u8* plane : cache.planes) all |= reinterpret_cast<u64>(plane);
    u64 most = cache.page_bytes;
    for (const Chunk& chunk : chunks) {
      all |= reinterpret_cast<u64>(chunk.payload);
      most = std::max(most, cache.payload_bytes(mode, chunk));
      if (cache.splits_pages(mode, chunk)) all |= cache.token_bytes;
    }
    if (all % 16 == 0 && most / 16 < (u64{1} << Divisor<u32>::kBits) - kTileLanes<16>) return 16;
    return all % 4 == 0 ? 4 : 1;
  }
};

u32 multiprocessors(const char* op, int device) {
  int count = 0;
  LMC_CUDA_CHECK(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return static_cast<u32>(count);
}

// Whether a scatter from host memory can be done by the bulk copy engine: the code for this device, which may be older
// than the device, has it.
bool has_bulk_copies(const Call& call) {
  cudaFuncAttributes code{};
  LMC_CUDA_CHECK(call.op, cudaFuncGetAttributes(&code, scatter_bulk_kernel));
  return code.ptxVersion >= 90;
}

// Those of a call's chunks that one kernel copies.
template <u32 kUnit>
struct Part {
  Parameters<kUnit> parameters{};
  Table table;
  std::vector<ChunkWork<typename IndexOf<kUnit>::type>> works;
  u64 blocks, first_sum;

  u64 tiles() const { return works.back().tiles_end; }
  PartialSums::Range sums_of(u64 c) const {
    const u64 begin = c ? works[c - 1].tiles_end : 0, end = works[c].tiles_end;
    if (begin == end) return {0, 0, 0};
    const u64 first_block = block_of_tile(begin, tiles(), blocks), last_block = block_of_tile(end - 1, tiles(), blocks);
    return {first_sum + (first_block + c) * kWarps, first_sum + (last_block + c + 1) * kWarps,
            checksum_length(static_cast<u64>(works[c].units) * kUnit)};
  }
};

// From chunk `first` on until the parameters are full: at least this one.
template <u32 kUnit>
Part<kUnit> part_from(const Call& call, std::size_t first) {
  using Index = typename IndexOf<kUnit>::type;
  Part<kUnit> part{};
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
    const u64 bytes = call.cache.payload_bytes(call.mode, chunk), tile_bytes = kTileLanes<kUnit> * kLaneBytes;
    tiles += (bytes + tile_bytes - 1) / tile_bytes;
    part.works.push_back({chunk, Divisor<Index>(chunk.count ? chunk.count : 1), static_cast<Index>(bytes / kUnit),
                          chunk.offset / kLaneBytes, tiles});
  }
  Copy<Index>& copy = part.parameters.head;
  copy.layout = call.cache.in_units<Index>(kUnit, planes);
  copy.chunks = part.table.append(part.works.data(), part.works.size());
  copy.ids_in_table = call.host_ids;
  copy.tiles = tiles;
  return part;
}

template <u32 kUnit>
void launch_part(const Call& call, bool is_gather, const Part<kUnit>& part) {
  const auto stream = static_cast<cudaStream_t>(call.where.stream);
  const dim3 grid(static_cast<u32>(part.blocks));
  if constexpr (kUnit == 16)
    if (call.where.payloads_on_host && !is_gather && has_bulk_copies(call)) {
      constexpr int shared_bytes = sizeof(TileRing);
      LMC_CUDA_CHECK(call.op, cudaFuncSetAttribute(scatter_bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   shared_bytes));
      LMC_CUDA_CHECK(call.op, launch(scatter_bulk_kernel, grid, dim3(kThreads), shared_bytes, stream, part.parameters));
      return;
    }
  void (*kernel)(Parameters<kUnit>) =
      call.mode == Mode::kPage ? (is_gather ? gather_kernel<Mode::kPage, kUnit> : scatter_kernel<Mode::kPage, kUnit>)
                               : (is_gather ? gather_kernel<Mode::kToken, kUnit> : scatter_kernel<Mode::kToken, kUnit>);
  LMC_CUDA_CHECK(call.op, launch(kernel, grid, dim3(kThreads), 0, stream, part.parameters));
}

// checksums: device memory, one a chunk, or null.
template <u32 kUnit>
PartialSums run(const Call& call, bool is_gather, u64* checksums) {
  u64 most_blocks = static_cast<u64>(kBlocksPerSm<kUnit>) * multiprocessors(call.op, call.where.device);
  if (call.where.max_blocks) most_blocks = std::min<u64>(most_blocks, call.where.max_blocks);
  std::vector<Part<kUnit>> parts;
  PartialSums partial;
  u64 num_sums = 0;
  for (std::size_t first = 0; first < call.chunks.size(); first = partial.ranges.size()) {
    parts.push_back(part_from<kUnit>(call, first));
    Part<kUnit>& part = parts.back();
    part.blocks = std::min(part.tiles(), most_blocks);
    part.first_sum = num_sums;
    num_sums += (part.blocks + part.works.size()) * kWarps;
    for (u64 c = 0; c < part.works.size(); ++c) partial.ranges.push_back(part.sums_of(c));
  }
  const bool are_partial = static_cast<bool>(call.where.partial_sums);
  u64* sums = are_partial ? call.where.partial_sums(num_sums) : checksums;
  const char* op = call.op;
  const auto stream = static_cast<cudaStream_t>(call.where.stream);
  if (sums && !are_partial) LMC_CUDA_CHECK(op, cudaMemsetAsync(sums, 0, 8 * call.chunks.size(), stream));
  std::size_t first = 0;
  for (Part<kUnit>& part : parts) {
    part.parameters.head.partial_sums = are_partial;
    if (sums)
      part.parameters.head.sums = reinterpret_cast<unsigned long long*>(sums) + (are_partial ? part.first_sum : first);
    first += part.works.size();
    if (part.tiles() == 0) continue;
    part.table.put(call.op, call.where, part.parameters);
    launch_part(call, is_gather, part);
  }
  return partial;
}

PartialSums run(const Call& call, bool is_gather, u64* checksums) {
  if (call.chunks.empty()) return {};
  const DeviceGuard guard(call.op, call.where.device);
  switch (call.unit()) {
    case 16:
      return run<16>(call, is_gather, checksums);
    case 4:
      return run<4>(call, is_gather, checksums);
    default:
      return run<1>(call, is_gather, checksums);
  }
}

}  // namespace

PartialSums gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                   const Launch& where) {
  return run({mode == Mode::kPage ? "gather_pages" : "gather_tokens", cache, mode, chunks, host_ids, where}, true,
             checksums);
}

PartialSums scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
                    const Launch& where) {
  return run({mode == Mode::kPage ? "scatter_pages" : "scatter_tokens", cache, mode, chunks, host_ids, where}, false,
             checksums);
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
