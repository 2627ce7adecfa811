// Runs cases through lmc::cpu and compares every byte of every memory region with the bytes that Python expects.
//
//   cpu_driver CASES SIMD THREADS
//
// SIMD: one of simd_variants(), or `?` to print them. It is also built for other processors and run in an emulator, and
// built with sanitizers and -DLMC_THREAD_BYTES=1 -DLMC_STREAM_BYTES=1, so that small cases take the paths of large
// ones. CASES: see cases.h. Prints one line per failure and a count at the end; exit status 1 if there was a failure.
#include <memory>
#include <new>

#include "cases.h"

using namespace lmc;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGuardBytes = 0;
#else
constexpr std::size_t kGuardBytes = 64;
#endif
constexpr u8 kGuard = 0xEB;
constexpr std::size_t kAlignment = 64;

// A region in memory: guard, misalignment, the bytes, guard.
class Placed {
 public:
  explicit Placed(const Region& region) : region_(region), front_(kGuardBytes + region.misalignment) {
    bytes_ = front_ + region.before.size() + kGuardBytes;
    memory_ = static_cast<u8*>(::operator new(bytes_, std::align_val_t(kAlignment)));
    std::memset(memory_, kGuard, bytes_);
    if (!region.before.empty()) std::memcpy(at(), region.before.data(), region.before.size());
  }
  Placed(const Placed&) = delete;
  ~Placed() { ::operator delete(memory_, std::align_val_t(kAlignment)); }

  u8* at() const { return memory_ + front_; }
  bool holds(const std::string& bytes) const {
    for (u64 i = 0; i < bytes_; ++i)
      if (memory_[i] != (i - front_ < bytes.size() ? static_cast<u8>(bytes[i - front_]) : kGuard)) return false;
    return true;
  }
  const Region& region() const { return region_; }

 private:
  const Region& region_;
  u64 front_, bytes_;
  u8* memory_;
};

void copy(const Case& c, const std::vector<std::unique_ptr<Placed>>& regions, u32 threads) {
  const auto address = [&](u64 number) { return regions.at(number)->at(); };
  const CopyArguments copy(c, address);
  const auto optional = [&](const char* field) { return c.has(field) ? address(c.number(field)) : nullptr; };
  if (c.op == "gather") {
    cpu::gather(copy.cache, copy.mode, copy.chunks, reinterpret_cast<u64*>(optional("checksums")), threads);
  } else if (c.op == "gather_coded") {
    auto* sums = reinterpret_cast<u64*>(address(c.number("sums")));
    cpu::gather_coded(copy.cache, copy.chunks, sums, threads);
    forget_sums_of_garbage(sums, copy.chunks.size());
  } else if (c.op == "scatter_coded") {
    cpu::scatter_coded(copy.cache, copy.chunks, reinterpret_cast<u64*>(address(c.number("sums"))), threads);
  } else {
    cpu::scatter(copy.cache, copy.mode, copy.chunks, reinterpret_cast<u64*>(optional("checksums")), threads);
  }
}

void call(const Case& c, const std::vector<std::unique_ptr<Placed>>& regions, u32 threads) {
  if (c.op == "apply_mm_hashes_to_token_ids") {
    cpu::apply_mm_hashes_to_token_ids(reinterpret_cast<i64*>(regions.at(0)->at()), c.number("count"),
                                      ItemTable(c.items()));
  } else if (c.op == "prefix_keys") {
    const std::vector<u64> cuts = c.numbers("cuts");
    const TokenIds ids{regions.at(0)->at(), c.number("count"), c.number("wide") != 0};
    cpu::check_cuts(cuts, ids.count);
    cpu::prefix_keys(ids, ItemTable(c.items()), reinterpret_cast<const u8*>(c.field("root").data()), cuts,
                     regions.at(1)->at());
  } else {
    copy(c, regions, threads);
  }
}

// A description of the failure; empty if there is none.
std::string failure(const Case& c, u32 threads) {
  std::vector<std::unique_ptr<Placed>> regions;
  for (const Region& region : c.regions) regions.push_back(std::make_unique<Placed>(region));
  bool refused = false;
  try {
    call(c, regions, threads);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  if (refused != c.has("cpu_refused")) return refused ? "the call is refused" : "the call is not refused";
  for (const auto& placed : regions)
    if (!is_garbage(placed->region()) && !placed->holds(refused ? placed->region().before : placed->region().after))
      return "region " + placed->region().name + " is not as expected";
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) die("usage: cpu_driver CASES SIMD THREADS");
  const std::string simd = argv[2];
  if (simd == "?") {
    for (const std::string& name : cpu::simd_variants()) std::printf("%s\n", name.c_str());
    return 0;
  }
  cpu::use_simd(simd);
  const u32 threads = static_cast<u32>(std::strtoul(argv[3], nullptr, 0));
  u64 count = 0, failures = 0;
  for (const Case& c : read_cases(argv[1])) {
    if (c.has("refused") || (c.has("payloads") && c.number("payloads") == 2)) continue;  // CUDA only
    ++count;
    const std::string what = failure(c, threads);
    if (what.empty()) continue;
    std::printf("FAIL %s: %s\n", c.name.c_str(), what.c_str());
    ++failures;
  }
  std::printf("%llu cases, %llu failures\n", static_cast<unsigned long long>(count),
              static_cast<unsigned long long>(failures));
  return failures ? 1 : 0;
}
