// What the processes that share a slab tell each other without a lock: of every slot who has it pinned, which of its
// contents is the present one, and whether anybody asked for it. It lies in memory that all of them map.
//
// A pin and an eviction that meet: the reader sets its bit, then looks at the generation; the evictor changes the
// generation, then looks at the bits. Both in one total order, so that at least one of them sees the other and gives
// way. Evictors are one at a time (they hold the index's lock), readers are any number.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace lmc {

#ifdef LMC_SLAB_HOOK
void slab_hook();  // of the tests: called before each store to memory that processes share
#else
inline void slab_hook() {}
#endif

struct SlotState {
  std::atomic<std::uint64_t> pins;        // a bit for each process that has the slot pinned
  std::atomic<std::uint32_t> generation;  // of its contents; another one after they are gone
  std::atomic<std::uint32_t> visited;     // whether it was asked for since an evictor last looked
};
static_assert(sizeof(SlotState) == 16, "the table is a file format");
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "processes share no locks");

// One process's view of the table: `row`, in [0, 64), is its own. Pins count within the process; its bit is set while
// there is one. Slots are not checked against the table's size.
class SlabTable {
 public:
  SlabTable(void* slots, std::uint32_t row) : slots_(static_cast<SlotState*>(slots)), bit_(std::uint64_t{1} << row) {}

  std::uint32_t generation(std::uint32_t slot) const { return slots_[slot].generation.load(); }
  void set_generation(std::uint32_t slot, std::uint32_t generation) { slots_[slot].generation.store(generation); }

  // Whether the slot still holds that generation; it then counts as asked for.
  bool touch(std::uint32_t slot, std::uint32_t generation) {
    if (slots_[slot].generation.load() != generation) return false;
    if (!slots_[slot].visited.load(std::memory_order_relaxed)) slots_[slot].visited.store(1, std::memory_order_relaxed);
    return true;
  }

  // Keeps the slot's contents in place until unpin, if they still are of that generation.
  bool pin(std::uint32_t slot, std::uint32_t generation) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::uint32_t& count = counts_[slot];
    slab_hook();
    if (count == 0) slots_[slot].pins.fetch_or(bit_);
    if (slots_[slot].generation.load() == generation) {
      ++count;
      return true;
    }
    if (count == 0) drop(slot);
    return false;
  }

  void unpin(std::uint32_t slot) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = counts_.find(slot);
    if (found != counts_.end() && --found->second == 0) drop(slot);
  }

  bool pinned(std::uint32_t slot) const { return slots_[slot].pins.load() != 0; }

  // --- For whoever holds the index's lock.

  // Ends the present contents, unless they are pinned.
  bool evict(std::uint32_t slot) {
    SlotState& state = slots_[slot];
    if (state.pins.load() != 0) return false;
    slab_hook();
    const std::uint32_t generation = state.generation.fetch_add(1);
    slab_hook();
    if (state.pins.load() == 0) return true;
    state.generation.store(generation);  // who pinned it after the first look has it; who saw the change misses it
    return false;
  }

  // Ends the present contents for those who come later; whoever has them pinned goes on reading them.
  void retire(std::uint32_t slot) {
    slab_hook();
    slots_[slot].generation.fetch_add(1);
  }

  bool take_visited(std::uint32_t slot) { return slots_[slot].visited.exchange(0) != 0; }

  // Takes back all pins of processes that are dead, or of this one before it leaves; a bit for each row.
  void clear_rows(std::uint64_t rows, std::uint64_t num_slots) {
    for (std::uint64_t slot = 0; slot < num_slots; ++slot)
      if (slots_[slot].pins.load(std::memory_order_relaxed) & rows) slots_[slot].pins.fetch_and(~rows);
  }

  // Ends all pins of this process; `unpin` does nothing for them any more.
  void unpin_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [slot, count] : counts_) slots_[slot].pins.fetch_and(~bit_);
    counts_.clear();
  }

  // Makes this process's bits say what it has pinned, whatever they said.
  void assert_pins(std::uint64_t num_slots) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (std::uint64_t slot = 0; slot < num_slots; ++slot)
      if ((slots_[slot].pins.load(std::memory_order_relaxed) & bit_) &&
          !counts_.count(static_cast<std::uint32_t>(slot)))
        slots_[slot].pins.fetch_and(~bit_);
    for (const auto& [slot, count] : counts_) slots_[slot].pins.fetch_or(bit_);
  }

 private:
  void drop(std::uint32_t slot) {
    slab_hook();
    counts_.erase(slot);
    slots_[slot].pins.fetch_and(~bit_);
  }

  SlotState* slots_;
  std::uint64_t bit_;
  std::mutex mutex_;
  std::unordered_map<std::uint32_t, std::uint32_t> counts_;  // pins of this process
};

}  // namespace lmc
