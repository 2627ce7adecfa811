// If somebody truncates a mapped file or its disk fails, touching the lost pages would kill the process by SIGBUS. This
// replaces them with private zero pages, and reports the loss.
#pragma once

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace lmc {

// Guards a mapping during its own lifetime; beyond 256 mappings it does nothing.
class SlabPages {
 public:
  SlabPages(void* address, std::size_t bytes) {
    static std::once_flag installed;
    std::call_once(installed, [] {
      struct sigaction action{};
      action.sa_sigaction = &on_signal;
      action.sa_flags = SA_SIGINFO | SA_NODEFER;
      sigaction(SIGBUS, &action, &before_);
    });
    for (Range& range : ranges_) {
      bool free = false;
      if (!range.taken.compare_exchange_strong(free, true)) continue;
      range.lost = false;
      range.begin = reinterpret_cast<std::uintptr_t>(address);
      range.end = reinterpret_cast<std::uintptr_t>(address) + bytes;
      range_ = &range;
      break;
    }
  }
  ~SlabPages() {
    if (!range_) return;
    range_->end = 0;
    range_->taken = false;
  }
  SlabPages(const SlabPages&) = delete;
  SlabPages& operator=(const SlabPages&) = delete;

  bool lost() const { return range_ && range_->lost; }

 private:
  struct Range {
    std::atomic<bool> taken, lost;
    std::atomic<std::uintptr_t> begin, end;
  };

  static void on_signal(int number, siginfo_t* info, void* context) {
    constexpr std::uintptr_t kPage = 4096;
    const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (Range& range : ranges_) {
      if (at < range.begin || at >= range.end) continue;
      void* page = reinterpret_cast<void*>(at / kPage * kPage);
      if (mmap(page, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        break;
      range.lost = true;
      return;
    }
    if (before_.sa_flags & SA_SIGINFO)
      before_.sa_sigaction(number, info, context);
    else if (before_.sa_handler != SIG_DFL && before_.sa_handler != SIG_IGN)
      before_.sa_handler(number);
    else
      sigaction(SIGBUS, &before_, nullptr);  // the access is repeated and ends the process
  }

  static inline std::array<Range, 256> ranges_;  // zero-initialized, being static
  static inline struct sigaction before_;
  Range* range_ = nullptr;
};

}  // namespace lmc
