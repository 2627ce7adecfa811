// Runs cases through lmc::cuda and compares every byte of every memory region with the bytes that Python expects.
//
//   driver CASES [--schedules N] [--seed S] [--threads T] [--fail-fast]
//          [--graphs] [--api-failures] [--watchdog SECONDS]   (the last two: the stand-in only)
//
// It is built against the stand-in in this folder, or with nvcc for a GPU (nvcc -x cu driver.cpp, with csrc/*.cu). A
// schedule runs each case once. The seed determines the order, the batches, which are enqueued on several streams
// before any wait, and the scheduling inside the stand-in. Each thread runs its own schedules.
// --graphs instead captures each case in a CUDA graph, which then runs twice. --api-failures makes each CUDA call of
// each case fail in turn, and expects an exception, no leaks, and a correct next call. Prints one line per failure and
// a count at the end; exit status 1 if there was a failure. CASES: see ../cases.h.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <utility>

#include "../cases.h"
#include "device_memory.h"

using namespace lmc;

namespace {

#ifdef LMC_HOST_CUDA
constexpr std::size_t kGuardBytes = 0;  // AddressSanitizer watches the bytes around allocations
#else
constexpr std::size_t kGuardBytes = 256;
#endif
constexpr u8 kGuard = 0xEB;
constexpr int kStreams = 4;

// --- One case on a stream

// A region in device memory: guard, misalignment, the bytes, guard.
struct Placed {
  u64 bytes;
  DeviceMemory device;
  PinnedMemory in, out;
};

class Run {
 public:
  int calls_until_failure = 0;    // counts the op's own CUDA calls
  std::size_t tables_placed = 0;  // tables of the call that did not fit into kernel parameters

  Run(const Case& c, int device, cudaStream_t stream) : case_(c), device_(device), stream_(stream) {
    for (const Region& region : case_.regions) {
      Placed placed{};
      if (!region.host && region.misalignment + region.before.size() + kGuardBytes > 0) {
        placed.bytes = front(region) + region.before.size() + kGuardBytes;
        placed.device = device_memory(placed.bytes);
        placed.in = pinned_memory(placed.bytes);
        placed.out = pinned_memory(placed.bytes);
        std::memset(placed.in.get(), kGuard, placed.bytes);
        if (!region.before.empty())
          std::memcpy(placed.in.get() + front(region), region.before.data(), region.before.size());
      }
      placed_.push_back(std::move(placed));
    }
    if (case_.op == "prefix_keys")
      workspace_ =
          device_memory(cuda::prefix_keys_workspace_bytes(case_.number("count"), case_.field("cuts").size() / 8));
  }

  void upload() {
    for (const Placed& p : placed_)
      if (p.bytes) CHECK(cudaMemcpyAsync(p.device.get(), p.in.get(), p.bytes, cudaMemcpyHostToDevice, stream_));
  }
  void download() {
    for (const Placed& p : placed_)
      if (p.bytes) CHECK(cudaMemcpyAsync(p.out.get(), p.device.get(), p.bytes, cudaMemcpyDeviceToHost, stream_));
  }

  // Before this returns, all host memory that was passed to the call is overwritten and freed.
  void call() {
    std::vector<std::vector<u8>> host_ids;
    for (const Region& region : case_.regions)
      host_ids.emplace_back(region.host ? region.before.begin() : region.before.end(), region.before.end());
    const auto address = [&](u64 number) -> u8* {
      const Region& region = case_.regions.at(number);
      if (region.host) return host_ids[number].data();
      return placed_[number].bytes ? placed_[number].device.get() + front(region) : nullptr;
    };
    if (case_.op == "apply_mm_hashes_to_token_ids") {
      auto* ids = reinterpret_cast<i64*>(address(0));
      cuda::apply_mm_hashes_to_token_ids(ids, case_.number("count"), ItemTable(case_.items()), launch());
    } else if (case_.op == "prefix_keys") {
      const ItemTable items(case_.items());
      std::vector<u64> cuts = case_.numbers("cuts");
      const TokenIds ids{address(0), case_.number("count"), case_.number("wide") != 0};
      cuda::prefix_keys(ids, items, reinterpret_cast<const u8*>(case_.field("root").data()), cuts, address(1),
                        workspace_.get(), launch());
      std::fill(cuts.begin(), cuts.end(), ~u64{0});
    } else if (case_.op == "gather" || case_.op == "scatter") {
      copy(address);
    } else if (case_.op == "gather_coded" || case_.op == "scatter_coded") {
      copy_coded(address);
    } else {
      die("no op " + case_.op);
    }
    for (std::vector<u8>& ids : host_ids) std::fill(ids.begin(), ids.end(), u8{0xFF});
  }

  // The first unexpected byte of each region; empty if there is none.
  std::vector<std::string> differences() const {
    std::vector<std::string> out;
    if (partial_sums_) {
      const u64 number = case_.number(case_.has("sums") ? "sums" : "checksums");
      std::vector<u64> sums = ranges_.add_up(reinterpret_cast<const u64*>(partial_sums_.get()));
      if (case_.op == "scatter_coded")
        for (std::size_t c = 0; c < sums.size(); c += kCodedSums) sums.insert(sums.begin() + c + 1, kCodedSums - 1, 0);
      if (case_.op == "gather_coded") forget_sums_of_garbage(sums.data(), sums.size() / kCodedSums);
      std::memcpy(placed_[number].out.get() + front(case_.regions[number]), sums.data(), 8 * sums.size());
    }
    for (std::size_t r = 0; r < placed_.size(); ++r) {
      const Placed& p = placed_[r];
      const Region& region = case_.regions[r];
      const bool on_host = region.name.rfind("payload", 0) == 0 && case_.number("payloads") == 1;
      if (is_garbage(region)) continue;
      const u8* bytes = (on_host ? p.in : p.out).get();
      for (u64 i = 0; i < p.bytes; ++i) {
        const u64 at = i - front(region);
        const u8 want = at < region.after.size() ? static_cast<u8>(region.after[at]) : kGuard;
        if (bytes[i] == want) continue;
        char text[160];
        std::snprintf(text, sizeof text, "byte %lld of %zu: got 0x%02x, want 0x%02x",
                      static_cast<long long>(i) - static_cast<long long>(front(region)), region.after.size(), bytes[i],
                      want);
        out.push_back("region " + region.name + ", " + text);
        break;
      }
    }
    return out;
  }

 private:
  static u64 front(const Region& region) { return kGuardBytes + region.misalignment; }

  cuda::Launch launch() {
    cuda::Launch where{device_, stream_};
    if (case_.has("max_blocks")) where.max_blocks = static_cast<u32>(case_.number("max_blocks"));
    where.place_table = [this](const u8* table, u64 bytes) {
      ++tables_placed;
      memory_.push_back(own_memory(bytes));
      std::memcpy(memory_.back().get(), table, bytes);
      return memory_.back().get();
    };
#ifdef LMC_HOST_CUDA
    if (calls_until_failure) host_cuda::calls().until_failure = calls_until_failure;
#endif
    return where;
  }

  // Its calls do not count as the op's own.
  static PinnedMemory own_memory(u64 bytes) {
#ifdef LMC_HOST_CUDA
    const int until_failure = std::exchange(host_cuda::calls().until_failure, 0);
    PinnedMemory memory = pinned_memory(bytes);
    host_cuda::calls().until_failure = until_failure;
    return memory;
#else
    return pinned_memory(bytes);
#endif
  }

  template <typename Address>
  void copy(const Address& address) {
    CopyArguments copy(case_, address);
    const u64 payloads = case_.number("payloads");
    for (std::size_t i = 0; payloads && i < copy.chunks.size(); ++i) {
      const u64 number = case_.numbers("chunks")[6 * i + 4];
      copy.chunks[i].payload =
          payloads == 1 && placed_[number].bytes ? placed_[number].in.get() + front(case_.regions[number]) : nullptr;
    }
    const auto optional = [&](const char* field) { return case_.has(field) ? address(case_.number(field)) : nullptr; };
    const bool host_ids = case_.number("host_ids") != 0;
    cuda::Launch where = launch();
    where.payloads_on_host = payloads == 1;
    if (case_.number("partial_sums")) take_partial_sums(where);
    auto* checksums = reinterpret_cast<u64*>(optional("checksums"));
    const auto op = case_.op == "gather" ? cuda::gather : cuda::scatter;
    ranges_ = op(copy.cache, copy.mode, copy.chunks, host_ids, checksums, where);
  }

  template <typename Address>
  void copy_coded(const Address& address) {
    const CopyArguments copy(case_, address);
    cuda::Launch where = launch();
    take_partial_sums(where);
    const auto op = case_.op == "gather_coded" ? cuda::gather_coded : cuda::scatter_coded;
    ranges_ = op(copy.cache, copy.chunks, case_.number("host_ids") != 0, where);
  }

  void take_partial_sums(cuda::Launch& where) {
    where.partial_sums = [this](u64 count) {
      partial_sums_ = own_memory(8 * count);
      return reinterpret_cast<u64*>(partial_sums_.get());
    };
  }

  const Case& case_;
  int device_;
  cudaStream_t stream_;
  std::vector<Placed> placed_;
  DeviceMemory workspace_;
  std::vector<PinnedMemory> memory_;
  PinnedMemory partial_sums_;
  cuda::PartialSums ranges_;
};

// --- Schedules

class Driver {
 public:
  u64 failures = 0, graphs = 0;

  Driver(bool fail_fast, bool alone) : fail_fast_(fail_fast), alone_(alone) {
    CHECK(cudaGetDeviceCount(&devices_));
    for (int device = 0; device < devices_; ++device) {
      CHECK(cudaSetDevice(device));
      streams_.emplace_back(1, nullptr);
      for (int i = 1; i < kStreams; ++i) {
        cudaStream_t stream = nullptr;
        CHECK(cudaStreamCreateWithFlags(&stream, i % 2 ? cudaStreamNonBlocking : cudaStreamDefault));
        streams_.back().push_back(stream);
      }
    }
  }

  void run_schedule(std::vector<const Case*> cases, u64 seed) {
    seed_ = seed;
    std::mt19937_64 random(seed);
    for (std::size_t i = cases.size(); i > 1; --i) std::swap(cases[i - 1], cases[random() % i]);
    for (std::size_t first = 0; first < cases.size();) {
      const int device = static_cast<int>(random() % static_cast<u64>(devices_));
      const std::size_t sizes[] = {1, 3, 5, 50};
      const std::size_t end = std::min(cases.size(), first + sizes[random() % 4]);
      CHECK(cudaSetDevice(device));
      std::vector<std::unique_ptr<Run>> runs;
      for (std::size_t i = first; i < end; ++i) {
        const cudaStream_t stream = streams_[device][random() % kStreams];
        runs.push_back(std::make_unique<Run>(*cases[i], device, stream));
        runs.back()->upload();
#ifdef LMC_HOST_CUDA
        if (alone_) host_cuda::options().compute_capability = random() % 4 ? 90 : 80;
#endif
        const int before = static_cast<int>(random() % static_cast<u64>(devices_));
        CHECK(cudaSetDevice(before));
        call(*cases[i], *runs.back());
        expect_unchanged(*cases[i], before);
        CHECK(cudaSetDevice(device));
        runs.back()->download();
      }
      for (const cudaStream_t stream : streams_[device]) CHECK(cudaStreamSynchronize(stream));
      for (std::size_t i = first; i < end; ++i) report(*cases[i], *runs[i - first]);
      first = end;
    }
  }

  // Captures before the memory has the bytes that the call reads. A call that cannot be captured must throw.
  void run_graph(const Case& c, u64 seed) {
    seed_ = seed;
    CHECK(cudaSetDevice(0));
    const cudaStream_t stream = streams_[0][1];
    Run run(c, 0, stream);
    std::string refusal;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    try {
      run.call();
    } catch (const std::runtime_error& error) {
      refusal = error.what();
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    for (int i = 0; i < 2; ++i) {
      run.upload();
      if (refusal.empty())
        CHECK(cudaGraphLaunch(executable, stream));
      else
        call(c, run);
      run.download();
      CHECK(cudaStreamSynchronize(stream));
      report(c, run);
    }
    CHECK(cudaGraphExecDestroy(executable));
    if (refusal.empty() != (run.tables_placed == 0)) fail(c, "captured with a table that is placed, or not without");
    if (!refusal.empty() && refusal.find("a CUDA graph cannot capture") == std::string::npos) fail(c, refusal);
    graphs += refusal.empty();
  }

#ifdef LMC_HOST_CUDA
  void fail_every_call(const Case& c, u64 seed) {
    seed_ = seed;
    CHECK(cudaSetDevice(0));
    for (int call = 1;; ++call) {
      Run run(c, 0, streams_[0][1]);
      run.upload();
      CHECK(cudaSetDevice(1));
      run.calls_until_failure = call;
      bool thrown = false;
      try {
        run.call();
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      const bool failed = std::exchange(host_cuda::calls().until_failure, 0) == 0;
      if (failed != thrown) fail(c, "CUDA call " + std::to_string(call) + " of the op failed, and nothing was thrown");
      expect_unchanged(c, 1);
      CHECK(cudaSetDevice(0));
      run.download();
      CHECK(cudaDeviceSynchronize());
      if (thrown) continue;
      report(c, run);
      return;
    }
  }
#endif

  void run_on_host(const Case& c) {
    const std::string &data = c.field("data"), &want = c.field("hash");
    u32 key[blake3::kKeyWords], out[blake3::kKeyWords];
    if (c.op == "blake3_keyed_hash") {
      std::memcpy(key, c.field("key").data(), sizeof key);
      blake3::hash(out, key, blake3::kKeyedHash, data);
    } else {
      blake3::hash(out, blake3::ContextKey(c.field("context")).words, blake3::kDeriveKeyMaterial, data);
    }
    if (std::memcmp(out, want.data(), sizeof out) != 0) fail(c, "another hash than the published one");
  }

 private:
  void fail(const Case& c, const std::string& what) {
    std::printf("FAIL %s: %s (seed %llu)\n", c.name.c_str(), what.c_str(), static_cast<unsigned long long>(seed_));
    std::fflush(stdout);
    ++failures;
    if (fail_fast_) std::_Exit(1);
  }

  void call(const Case& c, Run& run) {
    bool refused = false;
#ifdef LMC_HOST_CUDA
    host_cuda::calls() = {};
#endif
    try {
      run.call();
    } catch (const std::invalid_argument&) {
      refused = true;
    } catch (const std::exception& error) {
      fail(c, error.what());
    }
#ifdef LMC_HOST_CUDA
    const u64 most_blocks = c.has("max_blocks") ? c.number("max_blocks") : 0;
    if (most_blocks && host_cuda::calls().most_blocks > most_blocks) fail(c, "a grid exceeds max_blocks");
    if (alone_ && host_cuda::calls().waits) fail(c, "the call waits for the device");
#endif
    if (c.has("places_no_table") && run.tables_placed) fail(c, "kernel parameters do not hold the tables");
    if (refused != c.has("refused")) fail(c, refused ? "the call is refused" : "the call is not refused");
  }

  void report(const Case& c, const Run& run) {
    for (const std::string& difference : run.differences()) fail(c, difference);
  }

  void expect_unchanged(const Case& c, int device) {
    int now = -1;
    CHECK(cudaGetDevice(&now));
    if (now != device) fail(c, "the call leaves another device current");
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) fail(c, std::string("the call leaves an error behind: ") + cudaGetErrorString(error));
  }

  bool fail_fast_, alone_;
  int devices_ = 0;
  u64 seed_ = 0;
  std::vector<std::vector<cudaStream_t>> streams_;  // by device; the first is the NULL stream
};

}  // namespace

#ifdef LMC_HOST_CUDA
void seed_device(u64 seed) {
  host_cuda::seed(seed);
  host_cuda::options().multiprocessors = 1 + static_cast<int>(seed / 3 % 3);
}
#else
void seed_device(u64) {}
#endif

int main(int argc, char** argv) {
  if (argc < 2) die("usage: driver CASES [option]...");
  u64 schedules = 1, seed = 0, threads = 1;
  bool fail_fast = false, api_failures = false, graphs = false;
  for (int i = 2; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&]() -> const char* {
      if (i + 1 == argc) die(option + " needs a value");
      return argv[++i];
    };
    if (option == "--schedules")
      schedules = std::strtoull(value(), nullptr, 0);
    else if (option == "--seed")
      seed = std::strtoull(value(), nullptr, 0);
    else if (option == "--threads")
      threads = std::strtoull(value(), nullptr, 0);
    else if (option == "--fail-fast")
      fail_fast = true;
    else if (option == "--graphs")
      graphs = true;
#ifdef LMC_HOST_CUDA
    else if (option == "--api-failures")
      api_failures = true;
    else if (option == "--watchdog")
      host_cuda::options().watchdog_seconds = std::atoi(value());
#endif
    else
      die("no option " + option);
  }
  const std::vector<Case> cases = read_cases(argv[1]);
  std::vector<std::unique_ptr<Driver>> drivers;
  for (u64 t = 0; t < threads; ++t) drivers.push_back(std::make_unique<Driver>(fail_fast, threads == 1));
  std::vector<const Case*> on_device;
  u64 failures = 0;
  for (const Case& c : cases) {
    if (c.op.rfind("blake3", 0) == 0)
      drivers[0]->run_on_host(c);
    else
      on_device.push_back(&c);
  }
  for (u64 s = seed; s < seed + schedules; ++s) {
    seed_device(s);
    if (graphs) {
      for (const Case* c : on_device)
        if (!c->has("refused")) drivers[0]->run_graph(*c, s);
    } else if (api_failures) {
#ifdef LMC_HOST_CUDA
      for (const Case* c : on_device)
        if (!c->has("refused")) drivers[0]->fail_every_call(*c, s);
#endif
    } else if (threads == 1) {
      drivers[0]->run_schedule(on_device, s);
    } else {
      std::vector<std::thread> running;
      for (u64 t = 0; t < threads; ++t)
        running.emplace_back([&, t] { drivers[t]->run_schedule(on_device, s * threads + t); });
      for (std::thread& thread : running) thread.join();
    }
  }
  for (const auto& driver : drivers) failures += driver->failures;
  std::printf("%llu cases, %llu graphs, %llu schedules, %llu failures\n", static_cast<unsigned long long>(cases.size()),
              static_cast<unsigned long long>(drivers[0]->graphs), static_cast<unsigned long long>(schedules),
              static_cast<unsigned long long>(failures));
  return failures ? 1 : 0;
}
