// Readers pin slots and read their payloads while evictors overwrite them. A torn payload, or one of another generation
// than the pinned one, is an error. Built with ThreadSanitizer, which checks accesses to payloads.
#include <array>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "slab_table.h"

using lmc::SlabTable;
using lmc::SlotState;

namespace {

constexpr std::uint32_t kSlots = 5;
constexpr int kWords = 32;
constexpr int kRounds = 20000;

std::array<SlotState, kSlots> states{};
std::array<std::array<std::uint32_t, kWords>, kSlots> payloads{};  // all words are the generation
std::array<std::atomic<std::uint32_t>, kSlots> published{};        // the index: each slot's generation
std::atomic<std::uint64_t> reads{0}, evictions{0}, wrong{0};
std::mutex write_transaction;

// Stands for a separate process, with its own row; two of its threads may share a view.
void read(SlabTable& table, std::uint32_t seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    const std::uint32_t slot = random() % kSlots, generation = published[slot];
    if (!table.pin(slot, generation)) continue;
    for (const std::uint32_t word : payloads[slot])
      if (word != generation) ++wrong;
    ++reads;
    table.unpin(slot);
  }
}

void evict(SlabTable& table, std::uint32_t seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    std::lock_guard<std::mutex> lock(write_transaction);
    const std::uint32_t slot = random() % kSlots;
    if (table.take_visited(slot) || !table.evict(slot)) continue;
    const std::uint32_t generation = table.generation(slot);
    for (std::uint32_t& word : payloads[slot]) word = generation;
    published[slot] = generation;
    ++evictions;
  }
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<SlabTable>> tables;
  for (std::uint32_t row = 0; row < 4; ++row) tables.push_back(std::make_unique<SlabTable>(states.data(), row));
  for (std::uint32_t i = 0; i < 4; ++i) threads.emplace_back(read, std::ref(*tables[i / 2]), i);
  for (std::uint32_t i = 2; i < 4; ++i) threads.emplace_back(evict, std::ref(*tables[i]), i);
  for (std::thread& thread : threads) thread.join();
  for (const SlotState& state : states)
    if (state.pins != 0) ++wrong;
  std::printf("%llu reads, %llu evictions, %llu wrong\n", static_cast<unsigned long long>(reads),
              static_cast<unsigned long long>(evictions), static_cast<unsigned long long>(wrong));
  return wrong != 0 || reads == 0 || evictions == 0;
}
