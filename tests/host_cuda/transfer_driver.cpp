// Runs many concurrent stores and loads through lmc::cuda::Staging, between streams that write and read the same pages,
// and compares every byte.
//
//   transfer_driver [--schedules N] [--seed S] [--fail-fast]
//                   [--api-failures] [--watchdog SECONDS]   (these two: the stand-in only)
//
// It is built like driver.cpp. A schedule draws a layout, its layers, a ring, chunks and the order of everything from
// its seed. It writes pages, stores them, overwrites them, loads other payloads into them and reads them back, while
// earlier jobs are still under way. Each job uses its own path, all at once or layer by layer. Prints one line per
// failure and a count at the end; exit status 1 if there was a failure.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "checksum.h"
#include "device_memory.h"
#include "ops.h"

using namespace lmc;

namespace {

u64 failures = 0;
u64 schedule = 0;
bool fail_fast = false;

void fail(const std::string& what) {
  std::printf("FAIL %s (seed %llu)\n", what.c_str(), static_cast<unsigned long long>(schedule));
  std::fflush(stdout);
  ++failures;
  if (fail_fast) std::_Exit(1);
}

// first: number of the first lane.
i64 checksum(const std::vector<u8>& payload, u64 first = 0) {
  LaneSums sums;
  for (u64 at = 0; at < payload.size(); at += kLaneBytes) {
    u64 words[2] = {0, 0};
    std::memcpy(words, &payload[at], std::min<u64>(kLaneBytes, payload.size() - at));
    sums.add(first + at / kLaneBytes, words[0], words[1]);
  }
  return static_cast<i64>(sums.total() + checksum_length(payload.size()));
}

using Random = std::mt19937_64;

// A cache of opaque pages in device memory, [plane][page][run][byte].
struct Pages {
  PagedCache cache;
  u64 bytes;
  DeviceMemory memory;

  explicit Pages(Random& random) {
    const u64 planes = 1 + random() % 6, pages = 16, run_bytes = (1 + random() % 40) * (random() % 2 ? 16 : 4);
    const u64 runs = random() % 2 ? 1 : 1 + random() % 3, run_stride = run_bytes + (random() % 2 ? 0 : 48);
    const u64 page_stride = runs * run_stride;
    bytes = planes * pages * page_stride;
    memory = device_memory(bytes);
    cache = {{}, pages, page_stride, runs * run_bytes, run_bytes, run_stride, 4, 0};
    for (u64 p = 0; p < planes; ++p) cache.planes.push_back(memory.get() + p * pages * page_stride);
  }
  u64 end() const { return cache.planes.size(); }
  u64 plane_bytes() const { return bytes / end(); }
  u64 at(u64 plane, i64 page) const { return (plane * cache.num_pages + static_cast<u64>(page)) * cache.page_stride; }
  u64 payload_bytes(u64 pages) const { return cache.planes.size() * pages * cache.page_bytes; }
  u64 coded_bytes(u64 pages) const { return cache.planes.size() * coded_plane_bytes(pages * cache.page_bytes); }
  bool may_be_coded() const { return (cache.run_bytes | cache.run_stride) % kLaneBytes == 0; }
  // Visits each run of a payload: its offset in the payload and in the cache, ~0 if it is not in the cache.
  template <typename Visit>
  void visit(const std::vector<i64>& ids, const Visit& visit) const {
    u64 in_payload = 0;
    for (u64 plane = 0; plane < cache.planes.size(); ++plane)
      for (const i64 id : ids)
        for (u64 run = 0; run < cache.page_bytes / cache.run_bytes; ++run) {
          visit(in_payload, id < 0 ? ~u64{0} : at(plane, id) + run * cache.run_stride);
          in_payload += cache.run_bytes;
        }
  }
};

// Pinned memory, or pageable memory as in a store that could not be pinned.
struct HostMemory {
  PinnedMemory pinned;
  std::unique_ptr<u8[]> pageable;

  u8* get() const { return pinned ? pinned.get() : pageable.get(); }
};

HostMemory host_memory(Random& random, u64 bytes) {
  if (random() % 8 == 0) return {nullptr, std::make_unique<u8[]>(bytes)};
  return {pinned_memory(bytes), nullptr};
}

struct Record {
  std::vector<i64> ids;
  HostMemory payload;
  u64 bytes;
  std::vector<u8> want;
  bool coded = false;  // the payload has the coded tiles of `want`
};

// Numbers whose exponents take as many values as codes, so that every tile fits and has no exceptions.
std::vector<u8> random_numbers(Random& random, u64 bytes) {
  std::vector<u8> out(bytes);
  for (u64 i = 0; i < bytes / 2; ++i) {
    const u16 number = static_cast<u16>((random() & 0x807F) | (100 + random() % kWindow) << 7);
    std::memcpy(&out[2 * i], &number, 2);
  }
  return out;
}

// The coded tiles of such numbers and of zeros, by the definition.
std::vector<u8> coded_tiles(const std::vector<u8>& raw, u64 planes) {
  std::vector<u8> out;
  for (u64 plane = 0; plane < planes; ++plane)
    for (u64 at = 0, left = raw.size() / planes / 2; left > 0;) {
      const u64 numbers = std::min<u64>(left, kTileNumbers), begin = out.size();
      const u64 units = (numbers + kTileUnit - 1) / kTileUnit * kTileUnit;
      std::vector<u16> tile(units);
      std::memcpy(tile.data(), &raw[plane * (raw.size() / planes) + at], 2 * numbers);
      u32 top = kWindow;
      for (const u16 number : tile) top = std::max<u32>(top, number >> 7 & 0xFF);
      out.resize(begin + coded_tile_bytes(numbers));
      out[begin] = static_cast<u8>(top);
      u8* rest = &out[begin + sizeof(TileHead)];
      for (u64 i = 0; i < units; ++i) {
        const u32 exponent = tile[i] >> 7 & 0xFF;
        rest[i] = static_cast<u8>(tile[i] << 1 | tile[i] >> 15);
        rest[units + i / 2] |= static_cast<u8>((exponent ? exponent - (top - kWindow) : 0) << (i % 2 ? 4 : 0));
      }
      at += 2 * numbers;
      left -= numbers;
    }
  return out;
}

std::vector<Chunk> chunks_of(std::vector<Record>& records) {
  std::vector<Chunk> chunks;
  for (Record& record : records)
    chunks.push_back({record.ids.data(), record.ids.size(), record.ids.size() * 4, record.payload.get(), true});
  return chunks;
}

// Empty if no record is coded, as a rule.
std::vector<bool> coded_of(Random& random, const std::vector<Record>& records) {
  std::vector<bool> coded;
  for (const Record& record : records) coded.push_back(record.coded);
  const bool none = std::find(coded.begin(), coded.end(), true) == coded.end();
  return none && random() % 4 ? std::vector<bool>{} : coded;
}

// Where layers end. There may be a single layer with all planes.
std::vector<u64> draw_layers(Random& random, const Pages& pages) {
  std::vector<u64> ends;
  for (u64 end = 1; end < pages.end(); ++end)
    if (random() % 2) ends.push_back(end);
  ends.push_back(pages.end());
  return random() % 3 ? ends : std::vector<u64>{pages.end()};
}

// Whether copies can compute checksums of the layers' parts of payloads.
bool are_whole_lanes(const Pages& pages, const std::vector<u64>& ends) {
  return ends.size() == 1 || pages.cache.page_bytes % kLaneBytes == 0;
}

// How long fragments must be on average to bypass the ring: draws a value for which none, all or some do.
u64 draw_fragment_bytes(Random& random, const Pages& pages) {
  const u64 choice = random() % 3;
  return choice < 2 ? choice : 1 + random() % (3 * pages.cache.page_bytes);
}

// Pages of the cache, each at most once per round; sometimes one is missing.
std::vector<std::vector<i64>> draw_pages(Random& random, u64 pages) {
  std::vector<i64> all(pages);
  for (u64 i = 0; i < pages; ++i) all[i] = static_cast<i64>(i);
  for (u64 i = pages; i > 1; --i) std::swap(all[i - 1], all[random() % i]);
  std::vector<std::vector<i64>> out;
  for (u64 first = 0; first < pages;) {
    const u64 end = std::min(pages, first + 1 + random() % 5);
    out.emplace_back(all.begin() + static_cast<long>(first), all.begin() + static_cast<long>(end));
    if (random() % 8 == 0) out.back()[0] = -1;
    first = end;
  }
  return out;
}

// Chunks of all pages, or `repeated` chunks of one page. Their payloads are not filled yet.
std::vector<Record> draw_records(Random& random, const Pages& pages, bool may_be_coded, std::size_t repeated = 0) {
  std::vector<std::vector<i64>> drawn = draw_pages(random, pages.cache.num_pages);
  if (repeated) drawn.assign(repeated, {static_cast<i64>(random() % pages.cache.num_pages)});
  std::vector<Record> records;
  for (std::vector<i64>& ids : drawn) {
    const bool coded = may_be_coded && pages.may_be_coded() && random() % 2;
    const u64 bytes = pages.payload_bytes(ids.size()), stored = coded ? pages.coded_bytes(ids.size()) : bytes;
    records.push_back({std::move(ids), host_memory(random, stored), bytes, {}, coded});
  }
  return records;
}

// A stream of the caller that writes and reads pages, and the bytes that it read.
class Caller {
 public:
  explicit Caller(u64 bytes) : bytes_(bytes) { CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Caller() {
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaStreamDestroy(stream));
  }
  // Writes planes [first, end).
  void write(const Pages& pages, const std::vector<u8>& content, u64 first = 0, u64 end = ~u64{0}) {
    const u64 at = first * pages.plane_bytes(),
              bytes = std::min(bytes_, end == ~u64{0} ? bytes_ : end * pages.plane_bytes()) - at;
    kept_.push_back(pinned_memory(bytes));
    std::memcpy(kept_.back().get(), &content[at], bytes);
    CHECK(cudaMemcpyAsync(pages.memory.get() + at, kept_.back().get(), bytes, cudaMemcpyHostToDevice, stream));
  }
  u8* read(const Pages& pages, u64 first = 0, u64 end = ~u64{0}) {
    const u64 at = first * pages.plane_bytes(),
              bytes = std::min(bytes_, end == ~u64{0} ? bytes_ : end * pages.plane_bytes()) - at;
    kept_.push_back(pinned_memory(bytes));
    CHECK(cudaMemcpyAsync(kept_.back().get(), pages.memory.get() + at, bytes, cudaMemcpyDeviceToHost, stream));
    return kept_.back().get();
  }

  cudaStream_t stream = nullptr;

 private:
  u64 bytes_;
  std::vector<PinnedMemory> kept_;
};

struct Store {
  std::vector<Record> records;
  u64 planes;
  bool checksums;
  std::vector<bool> coded;
  std::unique_ptr<cuda::Staging::Job> job;

  void compare() {
    const std::vector<i64> sums = job->wait();
    std::vector<i64> wanted;
    for (const Record& record : records) {
      const std::vector<u8> stored = record.coded ? coded_tiles(record.want, planes) : record.want;
      if (std::memcmp(record.payload.get(), stored.data(), stored.size()) != 0) fail("a stored payload differs");
      wanted.push_back(checksum(record.want));
      if (coded.empty()) continue;
      wanted.push_back(record.coded ? checksum(stored, kCodedHeaderBytes / kLaneBytes) : 0);
      wanted.push_back(0);  // every tile fits
    }
    if (checksums && sums != wanted) fail("stored payloads have other checksums");
  }
};

u32 draw_kernel_blocks(Random& random) { return random() % 3 ? 0 : 1 + random() % 2; }

// A buffer size for chunks of at most 5 pages.
u64 draw_buffer_bytes(Random& random, const Pages& pages) {
  return (std::max(pages.payload_bytes(5), pages.coded_bytes(5)) + 255) / 256 * 256 * (1 + random() % 2);
}

template <typename Error, typename Work>
void must_throw(const char* what, const Work& work) {
  try {
    work();
    fail(what);
  } catch (const Error&) {
  }
}

void run(u64 seed) {
  Random random(seed);
  std::vector<Record> outliving(2);
  std::vector<std::unique_ptr<cuda::Staging::Job>> last;
  const Pages pages(random);
  const u64 buffers = 2 + random() % 2, buffer_bytes = draw_buffer_bytes(random, pages);
  const DeviceMemory store_ring = device_memory(buffers * buffer_bytes),
                     load_ring = device_memory(buffers * buffer_bytes);
  const u32 max_blocks = random() % 2;
  cuda::Staging stores(0, store_ring.get(), buffer_bytes, static_cast<u32>(buffers), false, max_blocks);
  cuda::Staging loads(0, load_ring.get(), buffer_bytes, static_cast<u32>(buffers), true, max_blocks);
  Caller caller(pages.bytes);

  std::vector<Store> stored;
  std::vector<u8> content(pages.bytes);
  for (int round = 0; round < 3; ++round) {
    content = random_numbers(random, pages.bytes);
    const std::vector<u64> ends = draw_layers(random, pages);
    std::vector<Record> drawn = draw_records(random, pages, true, round == 0 && seed % 4 == 1 ? 500 : 0);
    const std::vector<bool> coded = coded_of(random, drawn);
    Store store{std::move(drawn), pages.end(), are_whole_lanes(pages, ends), coded, {}};
    for (Record& record : store.records) {
      record.want.assign(record.bytes, 0);
      pages.visit(record.ids, [&](u64 in_payload, u64 in_cache) {
        if (in_cache != ~u64{0}) std::memcpy(&record.want[in_payload], &content[in_cache], pages.cache.run_bytes);
      });
    }
    store.job = stores.store(pages.cache, chunks_of(store.records), ends, store.checksums,
                             draw_fragment_bytes(random, pages), draw_kernel_blocks(random), coded);
    u64 first = 0;
    for (const u64 end : ends) {
      caller.write(pages, content, first, end);
      if (end == pages.end() || random() % 3)
        store.job->go_on(end, std::make_unique<cuda::Event>(0, caller.stream).get());
      first = end;
    }
    store.job->order(caller.stream, pages.end());
    caller.write(pages, random_numbers(random, pages.bytes));  // the pages have been reused by now
    if (random() % 3 == 0) store.compare();
    stored.push_back(std::move(store));
  }
  for (Store& store : stored) store.compare();

  std::vector<std::unique_ptr<cuda::Staging::Job>> jobs;
  std::vector<std::vector<Record>> loaded;
  std::vector<std::pair<const u8*, std::vector<u8>>> reads;
  std::vector<std::vector<i64>> checksums;
  for (int round = 0; round < 3; ++round) {
    content = random_numbers(random, pages.bytes);
    caller.write(pages, content);
    reads.emplace_back(caller.read(pages), content);  // others read these pages until the load starts
    std::vector<Record> records = draw_records(random, pages, true);
    std::vector<i64> sums;
    for (Record& record : records) {
      record.want = random_numbers(random, record.bytes);
      const std::vector<u8> stored = record.coded ? coded_tiles(record.want, pages.end()) : record.want;
      std::memcpy(record.payload.get(), stored.data(), stored.size());
      sums.push_back(checksum(record.want));
      pages.visit(record.ids, [&](u64 in_payload, u64 in_cache) {
        if (in_cache != ~u64{0}) std::memcpy(&content[in_cache], &record.want[in_payload], pages.cache.run_bytes);
      });
    }
    const std::vector<u64> ends = draw_layers(random, pages);
    if (random() % 4 == 0 || !are_whole_lanes(pages, ends)) sums.clear();  // a load without checksums
    jobs.push_back(loads.load(pages.cache, chunks_of(records), ends, !sums.empty(), cuda::Event(0, caller.stream),
                              draw_fragment_bytes(random, pages), draw_kernel_blocks(random),
                              coded_of(random, records)));
    cuda::Staging::Job& job = *jobs.back();
    const auto read_layers = [&] {
      u64 first = 0;
      for (const u64 end : ends) {
        job.order(caller.stream, end);
        reads.emplace_back(caller.read(pages, first, end),
                           std::vector<u8>(content.begin() + static_cast<i64>(first * pages.plane_bytes()),
                                           content.begin() + static_cast<i64>(end * pages.plane_bytes())));
        first = end;
      }
    };
    if (random() % 4 == 0) {  // another thread waits for layers while they are started
      std::thread waiting(read_layers);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      job.go_on(pages.end(), nullptr);
      waiting.join();
    } else {
      job.go_on(pages.end(), nullptr);
      read_layers();
    }
    if (random() % 3 == 0) {  // drop the job and its payloads without waiting
      jobs.pop_back();
      records.clear();
    } else {
      checksums.push_back(sums);
      loaded.push_back(std::move(records));
    }
  }
  for (std::size_t i = 0; i < jobs.size(); ++i)
    if (jobs[i]->wait() != checksums[i]) fail("a load has other checksums");
  CHECK(cudaStreamSynchronize(caller.stream));
  for (const auto& [got, want] : reads)
    if (std::memcmp(got, want.data(), want.size()) != 0) fail("pages differ");

  std::vector<i64> all(4096, 0);
  const std::vector<u64> whole{pages.end()};
  const Chunk too_large{all.data(), all.size(), all.size() * 4, nullptr, true};
  must_throw<std::invalid_argument>("a chunk that is too large is taken",
                                    [&] { stores.store(pages.cache, {too_large}, whole, true, 0, 0); });
  // Jobs outlive the Staging that made them, which outlives its ring.
  for (Record& record : outliving) {
    record = {{1, 2}, host_memory(random, pages.payload_bytes(2)), pages.payload_bytes(2), {}};
    std::memset(record.payload.get(), 0, record.bytes);
  }
  std::vector<Chunk> both = chunks_of(outliving);
  if (const Chunk part{all.data(), 1, 4, both[0].payload, true}; pages.end() > 1 && pages.cache.page_bytes % kLaneBytes)
    must_throw<std::invalid_argument>("checksums of layers that end anywhere are taken",
                                      [&] { stores.store(pages.cache, {part}, {1, pages.end()}, true, 0, 0); });
  std::unique_ptr<cuda::Staging::Job> given_up = stores.store(pages.cache, {both[0]}, {pages.end()}, true, 0, 0);
  must_throw<std::runtime_error>("a store that was given up has checksums", [&] { given_up->wait(); });
  given_up->go_on(pages.end(), nullptr);
  given_up->order(caller.stream, pages.end());
  given_up.reset();
  if (std::any_of(both[0].payload, both[0].payload + outliving[0].bytes, [](u8 byte) { return byte != 0; }))
    fail("a job that was given up goes on");
  stores.store(pages.cache, {}, whole, true, 0, 0)->order(caller.stream, pages.end());
  last.push_back(stores.store(pages.cache, {both[0]}, whole, true, random() % 2, random() % 2));
  last.back()->go_on(pages.end(), std::make_unique<cuda::Event>(0, caller.stream).get());
  last.back()->order(caller.stream, pages.end());
  last.push_back(loads.load(pages.cache, {both[1]}, whole, true, cuda::Event(0, caller.stream), random() % 2, 0));
  if (cudaGetLastError() != cudaSuccess) fail("an error is left behind");
}

#ifdef LMC_HOST_CUDA
// Ends the program if it has used no CPU for ten seconds: a deadlock.
[[noreturn]] void end_a_standstill() {
  for (std::clock_t before = std::clock();; before = std::clock()) {
    std::this_thread::sleep_for(std::chrono::seconds(10));
    if (std::clock() - before < CLOCKS_PER_SEC / 50) {
      fail("nothing moves");
      std::_Exit(1);
    }
  }
}

// Two threads that transfer for device 1 with one ring do not touch device 0, nor a graph that another thread captures.
void leave_others_alone(u64 seed) {
  Random random(seed);
  CHECK(cudaSetDevice(1));
  const Pages pages(random);
  const u64 buffer_bytes = draw_buffer_bytes(random, pages), fragment_bytes = random() % 2;
  const u32 kernel_blocks = random() % 2;
  const DeviceMemory ring = device_memory(2 * buffer_bytes);
  std::vector<Record> records = draw_records(random, pages, false);
  const std::vector<Chunk> chunks = chunks_of(records);
  const std::vector<u64> ends{pages.end()};
  Caller caller(pages.bytes), captured(0);
  const std::vector<u8> content = random_numbers(random, pages.bytes);
  caller.write(pages, content);
  const u8* const written = caller.read(pages);
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamBeginCapture(captured.stream, cudaStreamCaptureModeGlobal));
  const auto is_refused = [&](const auto& work) {
    try {
      work();
      fail("a transfer is ordered by a stream that is captured");
    } catch (const std::runtime_error& error) {
      if (!std::strstr(error.what(), "is being captured")) fail(error.what());
    }
  };
  const auto check_devices = [] {
    if (host_cuda::calls().devices != 2) fail("a thread for device 1 makes a context on device 0");
  };
  std::unique_ptr<cuda::Staging> staging;
  const auto transfer = [&](std::size_t c) {
    if (!staging) staging = std::make_unique<cuda::Staging>(1, ring.get(), buffer_bytes, 2, true, 0);
    const cuda::Event behind(1, caller.stream);
    if (c == 0) {
      behind.wait();
      if (std::memcmp(written, content.data(), content.size()) != 0)
        fail("an event was waited for, and the work before it has not run");
    }
    std::unique_ptr<cuda::Staging::Job> job =
        staging->store(pages.cache, {chunks[c]}, ends, true, fragment_bytes, kernel_blocks);
    job->go_on(pages.end(), &behind);
    const std::vector<i64> sums = job->wait();
    job = staging->load(pages.cache, {chunks[c]}, ends, true, behind, fragment_bytes, kernel_blocks);
    job->order(caller.stream, pages.end());
    if (job->wait() != sums) fail("a load on another device has other checksums");
    is_refused([&] { cuda::Event(1, captured.stream); });
    job = staging->load(pages.cache, {chunks[c]}, ends, false, behind, fragment_bytes, 0);
    is_refused([&] { job->order(captured.stream, pages.end()); });
    job.reset();
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    if (mode != cudaStreamCaptureModeGlobal) fail("a thread is left in another mode of capture");
    check_devices();
  };
  std::thread(transfer, 0).join();
  std::thread other(transfer, 1);
  std::thread(transfer, 2).join();
  other.join();
  std::thread([&] {
    staging.reset();
    check_devices();
  }).join();
  CHECK(cudaStreamEndCapture(captured.stream, &graph));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaSetDevice(0));
  cuda::Staging(1, ring.get(), buffer_bytes, 2, true, 0)
      .load(pages.cache, chunks, ends, false, cuda::Event(1, caller.stream), 0, 0)
      ->wait();
  int device = 1;
  CHECK(cudaGetDevice(&device));
  if (device != 0) fail("the device that a thread had chosen is another one");
}

// A transfer of many layers takes few calls, of which none waits, and few blocks.
void take_few_calls() {
  constexpr u64 planes = 40, page_bytes = 4096, num_pages = 16;
  const DeviceMemory memory = device_memory(planes * num_pages * page_bytes), ring = device_memory(2 << 21);
  const PinnedMemory payloads = pinned_memory(2 * planes * 4 * page_bytes);
  PagedCache cache{{}, num_pages, page_bytes, page_bytes, page_bytes, page_bytes, 4, 0};
  std::vector<u64> ends;
  for (u64 plane = 0; plane < planes; ++plane) {
    cache.planes.push_back(memory.get() + plane * num_pages * page_bytes);
    ends.push_back(plane + 1);
  }
  const i64 ids[] = {3, 1, 4, 15, 9, 2, 6, 5};
  std::vector<Chunk> chunks;
  for (u64 c = 0; c < 2; ++c)
    chunks.push_back({ids + 4 * c, 4, 16, payloads.get() + c * planes * 4 * page_bytes, true});
  host_cuda::options().multiprocessors = 132;
  Caller caller(0);
  cuda::Staging staging(0, ring.get(), 2 << 20, 2, true, 0);
  host_cuda::Calls& calls = host_cuda::calls();
  calls.launches = calls.copies = calls.delays = calls.most_blocks = 0;
  const auto expect = [&](u64 steps) {
    if (calls.launches != steps || calls.copies != steps) fail("a transfer takes more calls, or fewer, than its steps");
  };
  const cuda::Event behind(0, caller.stream);
  const std::unique_ptr<cuda::Staging::Job> load = staging.load(cache, chunks, ends, true, behind, 0, 0);
  expect(1);  // the first layer
  load->go_on(planes, nullptr);
  expect(2);
  const std::unique_ptr<cuda::Staging::Job> store = staging.store(cache, chunks, ends, true, 0, 0);
  for (u64 end = 1; end < planes; ++end) store->go_on(end, &behind);
  expect(3);  // the first layer; the others start with the last
  store->go_on(planes, &behind);
  expect(4);
  if (calls.delays) fail("a transfer loads a kernel or allocates pinned memory");
  if (calls.most_blocks != 16) fail("a transfer's kernels have other blocks than keep up with the bus");
  host_cuda::options().multiprocessors = 2;
}

// Makes each CUDA call of a store and of a load fail in turn. Expects an exception, nothing under way, and a correct
// next call.
void fail_every_call(u64 seed) {
  Random random(seed);
  const Pages pages(random);
  const u64 buffer_bytes = draw_buffer_bytes(random, pages);
  const DeviceMemory ring = device_memory(2 * buffer_bytes);
  for (int call = 1;; ++call) {
    Caller caller(pages.bytes);
    std::vector<u8> content = random_numbers(random, pages.bytes);
    caller.write(pages, content);
    std::vector<Record> records = draw_records(random, pages, true);
    const std::vector<bool> coded = coded_of(random, records);
    const std::vector<u64> ends = draw_layers(random, pages);
    const bool checksums = are_whole_lanes(pages, ends);
    host_cuda::calls().until_failure = call;
    std::unique_ptr<cuda::Staging> staging;
    std::unique_ptr<cuda::Staging::Job> job;
    bool is_begun = false;
    try {
      staging = std::make_unique<cuda::Staging>(0, ring.get(), buffer_bytes, 2, true, 0);
      const u64 fragment_bytes = seed / 3 % 2;
      const std::vector<Chunk> chunks = chunks_of(records);
      const cuda::Event behind(0, caller.stream);
      job = staging->store(pages.cache, chunks, ends, checksums, fragment_bytes, seed / 6 % 2, coded);
      job->go_on(pages.end(), &behind);
      is_begun = true;
      std::vector<i64> sums = job->wait();
      for (std::size_t i = 1; !coded.empty() && i < sums.size(); ++i)
        sums.erase(sums.begin() + i, sums.begin() + i + 2);
      job = staging->load(pages.cache, chunks, ends, checksums, behind, fragment_bytes, seed / 6 % 2, coded);
      is_begun = false;
      job->go_on(pages.end(), nullptr);
      is_begun = true;
      if (job->wait() != sums) fail("a payload has another checksum than when it was stored");
    } catch (const std::runtime_error&) {
      // Expected, unless the call is in a destructor, which cannot report errors.
    }
    const bool failed = host_cuda::calls().until_failure == 0;
    host_cuda::calls().until_failure = 0;
    if (failed && job && !is_begun) {
      job->order(caller.stream, pages.end());
      must_throw<std::runtime_error>("a job that failed has checksums", [&] { job->wait(); });
    }
    // Whatever was under way must not touch payloads, which are freed, or pages, which the caller uses again.
    job.reset();
    records.clear();
    caller.write(pages, content);
    const u8* read = caller.read(pages);
    CHECK(cudaDeviceSynchronize());
    if (std::memcmp(read, content.data(), pages.bytes) != 0)
      fail("CUDA call " + std::to_string(call) + " fails, and pages are written later");
    if (cudaGetLastError() != cudaSuccess) fail("CUDA call " + std::to_string(call) + " leaves an error behind");
    if (!failed) return;
  }
}
#endif

}  // namespace

int main(int argc, char** argv) {
  u64 schedules = 1, seed = 0;
  [[maybe_unused]] bool api_failures = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--api-failures")
      api_failures = true;
    else if (option == "--fail-fast")
      fail_fast = true;
#ifdef LMC_HOST_CUDA
    else if (i + 1 < argc && option == "--watchdog")
      host_cuda::options().watchdog_seconds = std::atoi(argv[++i]), std::thread(end_a_standstill).detach();
#endif
    else if (i + 1 < argc && option == "--schedules")
      schedules = std::strtoull(argv[++i], nullptr, 0);
    else if (i + 1 < argc && option == "--seed")
      seed = std::strtoull(argv[++i], nullptr, 0);
    else
      check(cudaErrorInvalidValue, option.c_str());
  }
  for (schedule = seed; schedule < seed + schedules; ++schedule) {
#ifdef LMC_HOST_CUDA
    host_cuda::seed(schedule);
    host_cuda::options().batch_copies = static_cast<int>(schedule / 3 % 3);
    if (api_failures) {
      fail_every_call(schedule);
      continue;
    }
    leave_others_alone(schedule);
    if (host_cuda::options().batch_copies == 1) take_few_calls();
#endif
    run(schedule);
  }
  std::printf("%llu schedules, %llu failures\n", static_cast<unsigned long long>(schedules),
              static_cast<unsigned long long>(failures));
  return failures ? 1 : 0;
}
