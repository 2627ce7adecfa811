// Checksums and copies on the host, with the same functors as the kernels.
#include <atomic>
#include <thread>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "ops.h"
#include "simd.h"

namespace lmc::cpu {
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
