// Runs stores and loads through lmc::cuda::Staging, many of them under way at once, between streams that write and read
// the same pages, and compares every byte.
//
//   transfer_driver [--schedules N] [--seed S] [--fail-fast]
//                   [--api-failures] [--watchdog SECONDS]   (these two: the stand-in only)
//
// It is built as driver.cpp is. A schedule draws a layout, a ring, chunks and the order of everything from its seed: it
// writes pages, stores them, overwrites them, loads other payloads into them and reads them back, while earlier jobs
// are still under way, each job by a path of its own. One line a failure, a count at the end, exit status 1 if there
// was any.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

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

// Of a part of a payload that begins at `offset` in it.
u64 checksum(const u8* payload, u64 bytes, u64 offset) {
  LaneSums sums;
  for (u64 at = 0; at < bytes; at += kLaneBytes) {
    u64 words[2] = {0, 0};
    std::memcpy(words, payload + at, at + kLaneBytes <= bytes ? kLaneBytes : bytes - at);
    sums.add((offset + at) / kLaneBytes, words[0], words[1]);
  }
  return sums.total() + checksum_length(bytes);
}

using Random = std::mt19937_64;

// A cache of opaque pages in device memory, [plane][page][run][byte].
struct Pages {
  PagedCache cache;
  u64 bytes;
  DeviceMemory memory;

  explicit Pages(Random& random) {
    const u64 planes = 1 + random() % 3, pages = 16, run_bytes = (1 + random() % 40) * (random() % 2 ? 16 : 4);
    const u64 runs = random() % 2 ? 1 : 1 + random() % 3, run_stride = run_bytes + (random() % 2 ? 0 : 48);
    const u64 page_stride = runs * run_stride;
    bytes = planes * pages * page_stride;
    memory = device_memory(bytes);
    cache = {{}, pages, page_stride, runs * run_bytes, run_bytes, run_stride, 4, 0};
    for (u64 p = 0; p < planes; ++p) cache.planes.push_back(memory.get() + p * pages * page_stride);
  }
  u64 at(u64 plane, i64 page) const { return (plane * cache.num_pages + static_cast<u64>(page)) * cache.page_stride; }
  u64 payload_bytes(u64 pages) const { return cache.planes.size() * pages * cache.page_bytes; }
  // Each run of a payload: where it is in the payload, and where in the cache, ~0 if nowhere.
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

// Pinned, or, as of a store that could not be pinned, not.
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
  u64 offset = 0;  // in a longer payload

  u64 checksum() const { return ::checksum(want.data(), bytes, offset); }
};

std::vector<Chunk> chunks_of(std::vector<Record>& records) {
  std::vector<Chunk> chunks;
  for (Record& record : records)
    chunks.push_back(
        {record.ids.data(), record.ids.size(), record.ids.size() * 4, record.payload.get(), true, record.offset});
  return chunks;
}

// How long fragments have to be for a path of their own, on average: none are, all are, some are.
u64 draw_fragment_bytes(Random& random, const Pages& pages) {
  const u64 choice = random() % 3;
  return choice < 2 ? choice : 1 + random() % (3 * pages.cache.page_bytes);
}

// Pages of the cache, each at most once in a round, now and then one that is not there.
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

// A stream of the caller's that writes and reads pages, and what it read.
class Caller {
 public:
  explicit Caller(u64 bytes) : bytes_(bytes) { CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Caller() {
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaStreamDestroy(stream));
  }
  void write(const Pages& pages, const std::vector<u8>& content) {
    kept_.push_back(pinned_memory(bytes_));
    std::memcpy(kept_.back().get(), content.data(), bytes_);
    CHECK(cudaMemcpyAsync(pages.memory.get(), kept_.back().get(), bytes_, cudaMemcpyHostToDevice, stream));
  }
  u8* read(const Pages& pages) {
    kept_.push_back(pinned_memory(bytes_));
    CHECK(cudaMemcpyAsync(kept_.back().get(), pages.memory.get(), bytes_, cudaMemcpyDeviceToHost, stream));
    return kept_.back().get();
  }

  cudaStream_t stream = nullptr;

 private:
  u64 bytes_;
  std::vector<PinnedMemory> kept_;
};

std::vector<u8> random_bytes(Random& random, u64 bytes) {
  std::vector<u8> out(bytes);
  for (u8& byte : out) byte = static_cast<u8>(random());
  return out;
}

struct Store {
  std::vector<Record> records;
  std::unique_ptr<cuda::Staging::Job> job;

  void compare(Random& random) {
    const bool asks = random() % 2;
    while (asks && !job->finished()) {
    }
    if (cudaGetLastError() != cudaSuccess) fail("asking leaves an error behind");
    std::vector<u64> sums;
    if (!asks) sums = job->wait();
    for (const Record& record : records)
      if (std::memcmp(record.payload.get(), record.want.data(), record.bytes) != 0) fail("a stored payload differs");
    if (asks) sums = job->wait();
    for (std::size_t i = 0; i < records.size(); ++i) {
      const Record& record = records[i];
      if (sums.at(i) != record.checksum()) fail("a stored payload has another checksum");
    }
  }
};

void run(u64 seed) {
  Random random(seed);
  std::vector<Record> outliving(2);
  std::vector<std::unique_ptr<cuda::Staging::Job>> last;
  const Pages pages(random);
  const u64 most_pages = 5, buffers = 2 + random() % 2;
  u64 buffer_bytes = cuda::Staging::least_buffer_bytes(pages.cache, most_pages);
  if (random() % 2) buffer_bytes *= 2;
  const DeviceMemory store_ring = device_memory(buffers * buffer_bytes),
                     load_ring = device_memory(buffers * buffer_bytes);
  cuda::Staging stores(0, store_ring.get(), buffer_bytes, static_cast<u32>(buffers));
  cuda::Staging loads(0, load_ring.get(), buffer_bytes, static_cast<u32>(buffers));
  Caller caller(pages.bytes);

  std::vector<Store> stored;
  std::vector<u8> content(pages.bytes);
  for (int round = 0; round < 3; ++round) {
    content = random_bytes(random, pages.bytes);
    caller.write(pages, content);
    Store store;
    for (std::vector<i64>& ids : draw_pages(random, pages.cache.num_pages)) {
      Record record{std::move(ids), {}, 0, {}};
      record.bytes = pages.payload_bytes(record.ids.size());
      record.payload = host_memory(random, record.bytes);
      record.want.assign(record.bytes, 0);
      pages.visit(record.ids, [&](u64 in_payload, u64 in_cache) {
        if (in_cache != ~u64{0}) std::memcpy(&record.want[in_payload], &content[in_cache], pages.cache.run_bytes);
      });
      record.offset = random() % 4 * 16;
      store.records.push_back(std::move(record));
    }
    store.job = stores.store(pages.cache, chunks_of(store.records), caller.stream, draw_fragment_bytes(random, pages));
    store.job->order(caller.stream);
    caller.write(pages, random_bytes(random, pages.bytes));  // the pages are somebody else's by now
    if (random() % 3 == 0) store.compare(random);
    stored.push_back(std::move(store));
  }
  for (Store& store : stored) store.compare(random);

  std::vector<std::unique_ptr<cuda::Staging::Job>> jobs;
  std::vector<std::vector<Record>> loaded;
  std::vector<std::pair<const u8*, std::vector<u8>>> reads;
  std::vector<std::vector<u64>> checksums;
  for (int round = 0; round < 3; ++round) {
    content = random_bytes(random, pages.bytes);
    caller.write(pages, content);
    reads.emplace_back(caller.read(pages), content);  // pages that others read until the load begins
    std::vector<Record> records;
    std::vector<u64> sums;
    for (std::vector<i64>& ids : draw_pages(random, pages.cache.num_pages)) {
      Record record{std::move(ids), {}, 0, {}};
      record.bytes = pages.payload_bytes(record.ids.size());
      record.payload = host_memory(random, record.bytes);
      record.want = random_bytes(random, record.bytes);
      std::memcpy(record.payload.get(), record.want.data(), record.bytes);
      record.offset = random() % 4 * 16;
      sums.push_back(record.checksum());
      pages.visit(record.ids, [&](u64 in_payload, u64 in_cache) {
        if (in_cache != ~u64{0}) std::memcpy(&content[in_cache], &record.want[in_payload], pages.cache.run_bytes);
      });
      records.push_back(std::move(record));
    }
    if (random() % 4 == 0) sums.clear();  // a load that sums up nothing
    const u32 kernel_blocks = random() % 3 ? 0 : 1 + random() % 2;
    jobs.push_back(loads.load(pages.cache, chunks_of(records), !sums.empty(), caller.stream,
                              draw_fragment_bytes(random, pages), kernel_blocks));
    jobs.back()->order(caller.stream);
    reads.emplace_back(caller.read(pages), content);
    if (random() % 3 == 0) {  // nobody waits for it, and its payloads are gone
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
    if (std::memcmp(got, want.data(), pages.bytes) != 0) fail("pages differ");

  std::vector<i64> all(4096, 0);
  const std::vector<Chunk> refused{{all.data(), all.size(), all.size() * 4, nullptr, true},
                                   {all.data(), 1, 4, nullptr, true, 8}};
  for (const Chunk& chunk : refused) try {
      stores.store(pages.cache, {chunk}, caller.stream, 0);
      fail("a chunk that is too large, or at an odd offset, is taken");
    } catch (const std::invalid_argument&) {
    }
  // Jobs outlive what made them, and that its ring.
  for (Record& record : outliving) {
    record.ids = {1, 2};
    record.bytes = pages.payload_bytes(2);
    record.payload = host_memory(random, record.bytes);
    std::memset(record.payload.get(), 0, record.bytes);
  }
  std::vector<Chunk> both = chunks_of(outliving);
  last.push_back(stores.store(pages.cache, {both[0]}, caller.stream, random() % 2));
  last.back()->order(caller.stream);
  last.push_back(loads.load(pages.cache, {both[1]}, true, caller.stream, random() % 2, 0));
  if (cudaGetLastError() != cudaSuccess) fail("an error is left behind");
}

#ifdef LMC_HOST_CUDA
// Every CUDA call of a store and of a load fails in turn: an exception, nothing under way, and the next one is right.
void fail_every_call(u64 seed) {
  Random random(seed);
  const Pages pages(random);
  const u64 buffer_bytes = cuda::Staging::least_buffer_bytes(pages.cache, 5);
  const DeviceMemory ring = device_memory(2 * buffer_bytes);
  for (int call = 1;; ++call) {
    Caller caller(pages.bytes);
    std::vector<u8> content = random_bytes(random, pages.bytes);
    caller.write(pages, content);
    std::vector<Record> records;
    for (std::vector<i64>& ids : draw_pages(random, pages.cache.num_pages)) {
      Record record{std::move(ids), {}, 0, {}};
      record.bytes = pages.payload_bytes(record.ids.size());
      record.payload = host_memory(random, record.bytes);
      records.push_back(std::move(record));
    }
    host_cuda::calls().until_failure = call;
    std::unique_ptr<cuda::Staging> staging;
    try {
      staging = std::make_unique<cuda::Staging>(0, ring.get(), buffer_bytes, 2);
      const u64 fragment_bytes = seed / 3 % 2;
      const std::vector<Chunk> chunks = chunks_of(records);
      const std::vector<u64> sums = staging->store(pages.cache, chunks, caller.stream, fragment_bytes)->wait();
      const u32 kernel_blocks = seed / 6 % 2;
      if (staging->load(pages.cache, chunks, true, caller.stream, fragment_bytes, kernel_blocks)->wait() != sums)
        fail("a payload has another checksum than when it was stored");
    } catch (const std::runtime_error&) {
      // As it has to be, unless the call is one of a destructor's, which have nobody to tell.
    }
    const bool failed = host_cuda::calls().until_failure == 0;
    host_cuda::calls().until_failure = 0;
    // Whatever was under way: its payloads are gone, and its pages are the caller's.
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
      host_cuda::options().watchdog_seconds = std::atoi(argv[++i]);
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
#endif
    run(schedule);
  }
  std::printf("%llu schedules, %llu failures\n", static_cast<unsigned long long>(schedules),
              static_cast<unsigned long long>(failures));
  return failures ? 1 : 0;
}
