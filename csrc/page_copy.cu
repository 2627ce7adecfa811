// Gather and scatter of paged KV on the GPU: all planes of many chunks in one launch.
//
// A payload is cut into lanes of 16 bytes and each lane is found in the cache by itself, whatever the runs' length, so
// that short runs keep as many bytes in flight as long ones. A thread loads four lanes before it stores any: with four
// blocks on an SM that is 64 KiB in flight. Lanes are copied in units of 16 bytes where all addresses and lengths allow
// it, else of 4 or 1.
#include "bulk_copy.h"
#include "error.h"
#include "ops.h"
#include "upload.h"

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
constexpr u32 kWarp = 32;
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

// A chunk and its place among the tiles of a call.
template <typename Index>
struct ChunkWork {
  Chunk chunk;
  Divisor<Index> count;
  Index units;
  u64 first_lane;  // of its payload, for the checksum
  u64 tiles_end;   // of this chunk and all before it
};

template <typename Index>
struct Copy {
  PagedLayout<Index> layout;
  const ChunkWork<Index>* chunks;
  u64 tiles;
  unsigned long long* checksums;  // one a chunk, or null
};

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

// Adds what the threads of a block have summed to a chunk's checksum. Whole warps call it.
__device__ void add_to_checksum(unsigned long long* checksum, u64 sum) {
  for (u32 step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) atomicAdd(checksum, sum);
}

// The first lane of a tile in the payload of its chunk.
template <u32 kUnit, typename Index>
__device__ Index tile_begin(const Copy<Index>& copy, u32 c, u64 tile) {
  return static_cast<Index>((tile - (c ? copy.chunks[c - 1].tiles_end : 0)) * kTileLanes<kUnit>);
}

// A block copies a contiguous range of tiles, chunk after chunk.
template <Mode kMode, bool kGather, u32 kUnit>
__device__ void copy_tiles(const Copy<typename IndexOf<kUnit>::type>& copy) {
  using Index = typename IndexOf<kUnit>::type;
  using Piece = typename Unit<kUnit>::type;
  constexpr u32 kUnits = kLaneBytes / kUnit;
  u64 tile = copy.tiles * blockIdx.x / gridDim.x;
  const u64 tiles_end = copy.tiles * (blockIdx.x + 1) / gridDim.x;
  u32 c = 0;
  while (tile < tiles_end) {
    while (copy.chunks[c].tiles_end <= tile) ++c;
    const ChunkWork<Index> work = copy.chunks[c];
    u8* payload = in_global_memory(work.chunk.payload);
    const bool vector = reinterpret_cast<std::uintptr_t>(payload) % kLaneBytes == 0;
    Index first = tile_begin<kUnit>(copy, c, tile) + threadIdx.x;
    LaneSums sums;
    for (; tile < tiles_end && tile < work.tiles_end; ++tile, first += kTileLanes<kUnit>) {
      Lane lanes[kLanes<kUnit>];
      LMC_UNROLL
      for (u32 v = 0; v < kLanes<kUnit>; ++v) {
        const Index lane = first + v * kThreads;
        if constexpr (kGather) {
          lanes[v].vector = make_uint4(0, 0, 0, 0);
          LMC_UNROLL
          for (u32 k = 0; k < kUnits; ++k) {
            const Index y = lane * kUnits + k;
            const u8* from = y < work.units ? cache_unit<kMode>(copy.layout, work.chunk, work.count, y) : nullptr;
            if (from) put_unit<kUnit>(lanes[v], k, *in_global_memory(reinterpret_cast<const Piece*>(from)));
          }
        } else {
          lanes[v] = load_payload<kUnit>(payload, vector, lane, work.units);
        }
      }
      LMC_UNROLL
      for (u32 v = 0; v < kLanes<kUnit>; ++v) {
        const Index lane = first + v * kThreads;
        if constexpr (kGather) {
          if (payload) store_payload<kUnit>(payload, vector, lane, work.units, lanes[v]);
        } else {
          LMC_UNROLL
          for (u32 k = 0; k < kUnits; ++k) {
            const Index y = lane * kUnits + k;
            u8* to = y < work.units ? cache_unit<kMode>(copy.layout, work.chunk, work.count, y) : nullptr;
            if (to) *in_global_memory(reinterpret_cast<Piece*>(to)) = get_unit<kUnit>(lanes[v], k);
          }
        }
        if (copy.checksums && lane * kUnits < work.units) add_lane(sums, work.first_lane + lane, lanes[v]);
      }
    }
    if (copy.checksums) add_to_checksum(copy.checksums + c, sums.total());
  }
}

template <Mode kMode, u32 kUnit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kUnit>)
    gather_kernel(const __grid_constant__ Copy<typename IndexOf<kUnit>::type> copy) {
  copy_tiles<kMode, true, kUnit>(copy);
}

template <Mode kMode, u32 kUnit>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kUnit>)
    scatter_kernel(const __grid_constant__ Copy<typename IndexOf<kUnit>::type> copy) {
  copy_tiles<kMode, false, kUnit>(copy);
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
  const u32 first = tile_begin<16>(copy, c, tile);
  const u32 lanes = at_most(work.units - first, kTileLanes<16>);
  ring.filled[stage].begin_copy(ring.tiles[stage], work.chunk.payload + static_cast<u64>(first) * kLaneBytes,
                                lanes * kLaneBytes);
}

// As scatter_kernel<Mode::kPage, 16>, for payloads in host memory, and for few blocks: the bulk copy engine keeps up to
// 64 KiB a block on the bus, which loads by threads do not.
__global__ void __launch_bounds__(kThreads) scatter_bulk_kernel(const __grid_constant__ Copy<u32> copy) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  TileRing& ring = shared_memory<TileRing>();
  const u64 begin = copy.tiles * blockIdx.x / gridDim.x, end = copy.tiles * (blockIdx.x + 1) / gridDim.x;
  u32 ahead = 0;  // the chunk of the tile that is filled next
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < kStages; ++stage) ring.filled[stage].init();
    for (u32 stage = 0; stage < kStages && begin + stage < end; ++stage)
      fill_stage(copy, ring, stage, begin + stage, ahead);
  }
  __syncthreads();
  u32 c = 0;
  LaneSums sums;
  for (u64 tile = begin; tile < end; ++tile) {
    if (copy.chunks[c].tiles_end <= tile) {
      if (copy.checksums) add_to_checksum(copy.checksums + c, sums.total());
      sums = LaneSums();
      while (copy.chunks[c].tiles_end <= tile) ++c;
    }
    const ChunkWork<u32>& work = copy.chunks[c];
    const u32 first = tile_begin<16>(copy, c, tile);
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
        if (copy.checksums) add_lane(sums, work.first_lane + lane_index, lane);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && tile + kStages < end) fill_stage(copy, ring, stage, tile + kStages, ahead);
  }
  if (copy.checksums && begin < end) add_to_checksum(copy.checksums + c, sums.total());
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

// Uploads the tables and runs the kernel. checksums: device memory, one a chunk, or null.
template <u32 kUnit>
void run(const Call& call, bool is_gather, u64* checksums) {
  using Index = typename IndexOf<kUnit>::type;
  const auto stream = static_cast<cudaStream_t>(call.where.stream);
  u8* workspace = static_cast<u8*>(call.where.workspace);
  UploadTable table;
  const u64 planes_at = table.append(call.cache.planes.data(), call.cache.planes.size());
  std::vector<ChunkWork<Index>> works;
  std::vector<u64> lengths;  // the checksums begin as the terms of the payloads' lengths
  constexpr u64 tile_bytes = kTileLanes<kUnit> * kLaneBytes;
  u64 tiles = 0;
  for (Chunk chunk : call.chunks) {
    const u64 bytes = call.cache.payload_bytes(call.mode, chunk);
    tiles += (bytes + tile_bytes - 1) / tile_bytes;
    lengths.push_back(checksum_length(bytes));
    if (call.host_ids) {
      const u64 at = chunk.wide ? table.append(static_cast<const i64*>(chunk.ids), chunk.count)
                                : table.append(static_cast<const std::int32_t*>(chunk.ids), chunk.count);
      chunk.ids = workspace + at;
    }
    works.push_back({chunk, Divisor<Index>(chunk.count ? chunk.count : 1), static_cast<Index>(bytes / kUnit),
                     chunk.offset / kLaneBytes, tiles});
  }
  const u64 works_at = table.append(works.data(), works.size());
  const u64 lengths_at = table.append(lengths.data(), lengths.size());
  PinnedBuffers::instance().upload(call.op, table, workspace, call.where.device, stream);

  if (checksums)
    LMC_CUDA_CHECK(call.op, cudaMemcpyAsync(checksums, workspace + lengths_at, 8 * lengths.size(),
                                            cudaMemcpyDeviceToDevice, stream));
  if (tiles == 0) return;
  Copy<Index> copy{};
  copy.layout = call.cache.in_units<Index>(kUnit, reinterpret_cast<u8* const*>(workspace + planes_at));
  copy.chunks = reinterpret_cast<const ChunkWork<Index>*>(workspace + works_at);
  copy.tiles = tiles;
  copy.checksums = reinterpret_cast<unsigned long long*>(checksums);
  u64 blocks = std::min(tiles, static_cast<u64>(kBlocksPerSm<kUnit>) * multiprocessors(call.op, call.where.device));
  if (call.where.max_blocks) blocks = std::min<u64>(blocks, call.where.max_blocks);
  if constexpr (kUnit == 16)
    if (call.where.payloads_on_host && has_bulk_copies(call)) {
      constexpr int shared_bytes = sizeof(TileRing);
      LMC_CUDA_CHECK(call.op, cudaFuncSetAttribute(scatter_bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   shared_bytes));
      LMC_CUDA_CHECK(call.op, launch(scatter_bulk_kernel, dim3(static_cast<u32>(blocks)), dim3(kThreads), shared_bytes,
                                     stream, copy));
      return;
    }
  void (*kernel)(Copy<Index>) =
      call.mode == Mode::kPage ? (is_gather ? gather_kernel<Mode::kPage, kUnit> : scatter_kernel<Mode::kPage, kUnit>)
                               : (is_gather ? gather_kernel<Mode::kToken, kUnit> : scatter_kernel<Mode::kToken, kUnit>);
  LMC_CUDA_CHECK(call.op, launch(kernel, dim3(static_cast<u32>(blocks)), dim3(kThreads), 0, stream, copy));
}

void run(const Call& call, bool is_gather, u64* checksums) {
  if (call.chunks.empty()) return;
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

u64 copy_workspace_bytes(const PagedCache& cache, const std::vector<Chunk>& chunks, bool host_ids) {
  u64 bytes = 8 * cache.planes.size() + 16;
  for (const Chunk& chunk : chunks)
    bytes += sizeof(ChunkWork<u64>) + 8 + (host_ids ? chunk.count * (chunk.wide ? 8 : 4) + 16 : 0);
  return (bytes + 2 * 16 + 255) / 256 * 256;
}

void gather(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
            const Launch& where) {
  run({mode == Mode::kPage ? "gather_pages" : "gather_tokens", cache, mode, chunks, host_ids, where}, true, checksums);
}

void scatter(const PagedCache& cache, Mode mode, const std::vector<Chunk>& chunks, bool host_ids, u64* checksums,
             const Launch& where) {
  run({mode == Mode::kPage ? "scatter_pages" : "scatter_tokens", cache, mode, chunks, host_ids, where}, false,
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
