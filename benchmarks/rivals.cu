// What others do for copies of pages, written from descriptions; built and timed by rivals.py. Addresses come as u64:
// count copies of `bytes` bytes each, from `source` to `to`. The result: null, or what went wrong.
#include <string>

#include "batch_copy.h"
#include "bulk_copy.h"

using namespace lmc;

namespace {

constexpr u32 kStages = 4, kTileBytes = 16 << 10;

struct Copies {
  const u64 *to, *source;
  u64 count, bytes;
};

struct Stages {
  uint4 tiles[kStages][kTileBytes / sizeof(uint4)];
  BulkBarrier filled[kStages];
};

struct Tile {
  u8 *to, *source;
  u32 bytes;
};

__device__ u64 tiles_a_copy(const Copies& copies) { return (copies.bytes + kTileBytes - 1) / kTileBytes; }

__device__ Tile tile_of(const Copies& copies, u64 i) {
  const u64 at = i % tiles_a_copy(copies) * kTileBytes, left = copies.bytes - at, copy = i / tiles_a_copy(copies);
  return {reinterpret_cast<u8*>(copies.to[copy]) + at, reinterpret_cast<u8*>(copies.source[copy]) + at,
          static_cast<u32>(left < kTileBytes ? left : kTileBytes)};
}

// One thread a block: the bulk copy engine moves tiles into shared memory and out again, and nobody sees the bytes.
__global__ void bulk_kernel(const Copies copies) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (threadIdx.x != 0) return;
  Stages& stages = shared_memory<Stages>();
  const u64 tiles = copies.count * tiles_a_copy(copies);
  const u64 begin = tiles * blockIdx.x / gridDim.x, end = tiles * (blockIdx.x + 1) / gridDim.x;
  const auto fill = [&](u64 i) {
    const Tile tile = tile_of(copies, i);
    const u32 stage = (i - begin) % kStages;
    stages.filled[stage].load(stages.tiles[stage], tile.source, tile.bytes);
    stages.filled[stage].arrive();
  };
  for (u32 stage = 0; stage < kStages; ++stage) stages.filled[stage].init(1);
  for (u64 i = begin; i < end && i < begin + kStages; ++i) fill(i);
  for (u64 i = begin; i < end; ++i) {
    const Tile tile = tile_of(copies, i);
    const u32 stage = (i - begin) % kStages;
    stages.filled[stage].wait(static_cast<u32>((i - begin) / kStages));
    bulk_store(tile.to, stages.tiles[stage], tile.bytes);
    commit_bulk_stores();
    wait_for_bulk_reads<1>();  // the tile before this one has left its stage
    if (i > begin && i - 1 + kStages < end) fill(i - 1 + kStages);
  }
  wait_for_bulk_stores();
#endif
}

template <typename Work>
const char* message_of(const Work& work) {
  static std::string message;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

// Host tables: a call to the runtime for each page.
extern "C" const char* copy_each(const u64* to, const u64* source, u64 count, u64 bytes, bool to_host, void* stream) {
  return message_of([&] {
    for (u64 i = 0; i < count; ++i)
      LMC_CUDA_CHECK("copy_each",
                     cudaMemcpyAsync(reinterpret_cast<void*>(to[i]), reinterpret_cast<const void*>(source[i]), bytes,
                                     to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice,
                                     static_cast<cudaStream_t>(stream)));
  });
}

// Host tables: one call to the driver for all pages, and no checksum.
extern "C" const char* copy_batch(const u64* to, const u64* source, u64 count, u64 bytes, bool to_host, void* stream) {
  return message_of([&] {
    std::vector<Fragment> fragments;
    for (u64 i = 0; i < count; ++i)
      fragments.push_back({reinterpret_cast<u8*>(to_host ? source[i] : to[i]),
                           reinterpret_cast<u8*>(to_host ? to[i] : source[i]), bytes});
    copy_fragments("copy_batch", fragments, to_host, true, static_cast<cudaStream_t>(stream));
  });
}

// Tables in the device's memory; `bytes` and all addresses are multiples of 16.
extern "C" const char* copy_bulk(const u64* to, const u64* source, u64 count, u64 bytes, u32 blocks, void* stream) {
  return message_of([&] {
    cudaFuncAttributes code{};
    LMC_CUDA_CHECK("copy_bulk", cudaFuncGetAttributes(&code, bulk_kernel));
    if (code.ptxVersion < 90) throw std::runtime_error("needs compute capability 9.0");
    LMC_CUDA_CHECK("copy_bulk", cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(sizeof(Stages))));
    LMC_CUDA_CHECK("copy_bulk", launch(bulk_kernel, dim3(blocks), dim3(32), sizeof(Stages),
                                       static_cast<cudaStream_t>(stream), Copies{to, source, count, bytes}));
  });
}
