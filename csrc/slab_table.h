// The state of slots that processes share without a lock, in memory that all of them map: for every slot, which
// processes have it pinned, the generation of its contents, and whether it was used recently.
//
// When a pin and an eviction meet, the reader sets its bit, then reads the generation; the evictor changes the
// generation, then reads the bits. All of this has one total order, so at least one of them sees the other and gives
// way. There is one evictor at a time (it holds the index's lock), and any number of readers.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace lmc {

#ifdef LMC_SLAB_HOOK
void slab_hook();  // for tests: called before each store to memory that processes share
#else
inline void slab_hook() {}
#endif

struct SlotState {
  std::atomic<std::uint64_t> pins;        // a bit for each process that has the slot pinned
  std::atomic<std::uint32_t> generation;  // of its contents; changes when they are gone
  std::atomic<std::uint32_t> visited;     // whether it was used since an evictor last looked
};
static_assert(sizeof(SlotState) == 16, "the table is a file format");
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "processes share no locks");

// One process's view of the table; `row`, in [0, 64), is the process's own. Pins are counted within the process; its
// bit is set while the count is positive. Slots are not checked against the table's size.
class SlabTable {
 public:
  SlabTable(void* slots, std::uint32_t row) : slots_(static_cast<SlotState*>(slots)), bit_(std::uint64_t{1} << row) {}

  std::uint32_t generation(std::uint32_t slot) const { return slots_[slot].generation.load(); }
  void set_generation(std::uint32_t slot, std::uint32_t generation) { slots_[slot].generation.store(generation); }

  // Whether the slot still holds that generation; then it counts as used.
  bool touch(std::uint32_t slot, std::uint32_t generation) {
    if (slots_[slot].generation.load() != generation) return false;
    if (!slots_[slot].visited.load(std::memory_order_relaxed)) slots_[slot].visited.store(1, std::memory_order_relaxed);
    return true;
  }

  // Keeps the slot's contents in place until unpin, if they still have that generation.
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

  // --- For the holder of the index's lock.

  // Ends the current contents, unless they are pinned.
  bool evict(std::uint32_t slot) {
    SlotState& state = slots_[slot];
    if (state.pins.load() != 0) return false;
    slab_hook();
    const std::uint32_t generation = state.generation.fetch_add(1);
    slab_hook();
    if (state.pins.load() == 0) return true;
    state.generation.store(generation);  // a reader that pinned it meanwhile hits, or misses if it saw the change
    return false;
  }

  // Ends the current contents for new readers; those that have them pinned may continue to read.
  void retire(std::uint32_t slot) {
    slab_hook();
    slots_[slot].generation.fetch_add(1);
  }

  bool take_visited(std::uint32_t slot) { return slots_[slot].visited.exchange(0) != 0; }

  // Removes all pins of dead processes, or of this one before it leaves; `rows` has a bit for each.
  void clear_rows(std::uint64_t rows, std::uint64_t num_slots) {
    for (std::uint64_t slot = 0; slot < num_slots; ++slot)
      if (slots_[slot].pins.load(std::memory_order_relaxed) & rows) slots_[slot].pins.fetch_and(~rows);
  }

  // Ends all pins of this process; `unpin` does nothing for them after that.
  void unpin_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [slot, count] : counts_) slots_[slot].pins.fetch_and(~bit_);
    counts_.clear();
  }

  // Sets this process's bits to exactly the slots that it has pinned.
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
