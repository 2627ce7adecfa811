// The index of a slab: which records exist, where there is room, and what to evict next. It lies in a file that all
// processes of a store map, after the header and the slots of slab_table.h.
//
// The entries are the truth: each granule has one, used by what begins there, and each is valid or not by itself (a
// checksum covers its content and place). The rest is derived from them: hash tables, lists, free extents, sums. A
// reader takes no lock and writes nothing: it probes, copies an entry, and misses unless that entry is valid and has
// its key. So neither damage nor a writer that stopped halfway can mislead a reader. Writers hold a lock, one at a
// time, which is released if the process dies, and set a mark while they change things. A writer that finds the mark of
// a dead writer, or an inconsistency, rebuilds the derived data from the entries.
#pragma once

#include <array>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "slab_pages.h"
#include "slab_table.h"

namespace lmc {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

constexpr u32 kSlabRows = 64;        // processes that may have a store open
constexpr u32 kSlabVersion = 2;      // of the file format
constexpr u32 kHeaderBytes = 4096;   // before the slots
constexpr u32 kForgotten = 8192;     // how many forgotten owners the file lists
constexpr u32 kNone = 0xFFFFFFFF;    // no granule
constexpr double kRestSeconds = 10;  // a dead process's transfers into its unpublished slots may last so long

struct SlabKey {
  std::array<u64, 8> words{};  // up to 64 bytes, then zeros
  u32 bytes = 0;
};
using SlabOwner = std::array<u64, 2>;  // 16 bytes; zeros for nobody

enum class SlabState : u32 { kFree = 0, kPending = 1, kRecord = 2, kResting = 3 };

// An entry's content: a payload from its granule on, published or not, or a place that is not free yet.
struct SlabContent {
  SlabKey key;
  SlabState state = SlabState::kFree;
  u32 granules = 0;
  u32 row = 0;         // of the process that fills it, if pending
  u32 generation = 0;  // valid only while its slot has this one
  u64 payload_bytes = 0;
  i64 checksum = 0;
  SlabOwner owner{};
  double time = 0;   // by the store's clock: when it was stored; if resting, when it becomes free
  u64 sequence = 0;  // its place in the eviction queue
};

struct SlabFound : SlabContent {
  u32 start = 0;
};

// What the index needs from the system.
class SlabLock {
 public:
  virtual ~SlabLock() = default;
  virtual bool lost() { return false; }  // whether a part of the file is lost
  virtual bool try_lock() = 0;
  virtual void unlock() = 0;
  virtual i64 holder() = 0;               // pid of the process that holds it; 0 if unknown
  virtual u64 alive() = 0;                // a bit for each row of another live process
  virtual void wait(double seconds) = 0;  // between two attempts
  virtual double seconds() = 0;           // by any monotonic clock
  virtual u64 random();                   // for a secret seed
};

// POSIX record locks on bytes of a file: one for each row, and one for writing.
class SlabFileLock final : public SlabLock {
 public:
  SlabFileLock(int fd, u32 byte, const SlabPages* pages = nullptr) : fd_(fd), byte_(byte), pages_(pages) {}
  bool lost() override { return pages_ && pages_->lost(); }
  bool try_lock() override;
  void unlock() override;
  i64 holder() override { return holder_of(byte_); }
  u64 alive() override;
  void wait(double seconds) override;
  double seconds() override;

 private:
  i64 holder_of(u32 byte);  // -1 if nobody holds it

  int fd_;
  u32 byte_;
  const SlabPages* pages_;
};

// The lock could not be taken in time.
struct SlabBusy : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The index was damaged again while it was rebuilt, a part of its file is lost, or the lock cannot be used.
struct SlabBroken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Changes only when a store is created, or opened after a restart of the machine.
struct SlabFixed {
  char magic[8];
  u32 version, rows;
  u32 granules, granule_bytes, segment_granules, unused;
  std::array<u64, 2> boot_id;
  double clock_base;  // the store's clock minus the machine's, which starts at boot
  u64 seed;           // of the store's hashes, secret since callers choose keys
};

struct SlabHeader;
struct SlabEntry;

// The terms of a change. `now`: seconds since the machine's boot. `wall`: since 1970. `patience`: the most seconds to
// wait for others. `ttl`, `quota`: 0 for none.
struct SlabTerms {
  double now = 0, wall = 0, patience = 0, ttl = 0;
  u64 quota = 0;
};

struct SlabPlace {
  u32 start = 0;
  u32 generation = 0;
};

struct SlabPut {
  SlabKey key;
  SlabPlace place;
  i64 checksum = 0;
  u64 as_of = 0;
  double age = 0;
};

// One process's view; its methods may be called from any thread.
class SlabIndex {
 public:
  struct Shape {
    u32 granules, granule_bytes, segment_granules;
  };

  // The file's size in bytes.
  static u64 file_bytes(const Shape& shape);
  // Parses a file's first page; nothing if it is damaged or not an index.
  static std::optional<SlabFixed> fixed_of(const void* page);

  // `file`: mapped, file_bytes long. `row`: this process's.
  SlabIndex(void* file, const Shape& shape, SlabLock& lock, u32 row);

  // Makes the index usable, as a new one if the file has none, or one of another boot without `keep`; takes the row.
  void open(const std::array<u64, 2>& boot_id, bool keep, const SlabTerms& terms);

  // --- For readers, without the lock

  std::optional<SlabFound> find(const SlabKey& key, double now, double ttl);
  double age(const SlabContent& content, double now) const { return now + clock_base_ - content.time; }
  u64 moment() const;
  std::vector<std::pair<const char*, u64>> sizes() const;
  SlabTable& table() { return table_; }
  u64 rows_taken() const;  // a bit for each row in use

  // --- Changes. They throw SlabBusy, having done nothing, if the lock cannot be taken in time.

  struct Reserved {
    std::vector<std::optional<SlabPlace>> places;
    u64 moment = 0, dropped = 0, evictions = 0;
  };
  // Slots for payloads, pending under this process's row; none for keys that have a record, and where there is no room,
  // which counts as dropped.
  Reserved reserve(const std::vector<SlabKey>& keys, const std::vector<u64>& sizes, const SlabOwner& owner,
                   const std::vector<SlabPlace>& given_back, const SlabTerms& terms);
  // Makes reserved slots records, the last one first. Returns how many; it skips keys that have a record by now, slots
  // that were taken back, and owners that were forgotten after the put's moment.
  u64 publish(const std::vector<SlabPut>& puts, const SlabTerms& terms);
  u64 abandon(const std::vector<SlabPlace>& places, const SlabTerms& terms);
  u64 remove(const std::vector<SlabKey>& keys, const SlabTerms& terms);
  void discard(const SlabKey& key, const SlabPlace& place, const SlabTerms& terms);
  u64 forget(const SlabOwner& owner, const SlabTerms& terms);
  u64 clear(const SlabTerms& terms);
  // Takes back everything that the dead processes of these rows held.
  void bury(u64 rows, const SlabTerms& terms);
  // Gives back everything that this process holds. Pins end at once, even if it throws SlabBusy.
  void close(const SlabTerms& terms);
  // Says what is wrong with the index, "" if nothing is. Repairs nothing.
  std::string check(const SlabTerms& terms);

 private:
  struct Damage {};  // found in derived data
  enum Sum : u32;
  class Held;

  template <class Work>
  std::invoke_result_t<Work&> change(const SlabTerms& terms, Work work);
  void begin(const SlabTerms& terms);
  void end();
  void expect_all();
  void follow();
  std::optional<SlabFixed> adopt();
  void write_fixed();
  void format();
  void rebuild(const SlabTerms& terms);
  u64 sums_check() const;

  u64 get(Sum sum) const;
  void set(Sum sum, u64 value);
  void add(Sum sum, i64 by) { set(sum, get(sum) + static_cast<u64>(by)); }
  static void expect(bool holds) {
    if (!holds) throw Damage{};
  }

  SlabContent load(u32 start, bool* valid) const;
  SlabContent need(u32 start) const;  // of an entry that must be valid
  void store(u32 start, const SlabContent& content);
  void restore_old();
  void erase(u32 start);
  bool fits(u32 start, const SlabContent& content) const;

  u64 key_hash(const SlabKey& key) const;
  u64 owner_hash(const SlabOwner& owner) const;
  using HashOf = std::function<u64(u32)>;
  void hash_insert(std::atomic<u32>* slots, u64 hash, u32 start);
  void hash_remove(std::atomic<u32>* slots, u64 hash, u32 start, const HashOf& hash_of);
  u32 hash_place(u64 hash) const;
  u32 hash_value(u64 hash, u32 start) const;
  std::optional<SlabFound> there(const SlabKey& key);
  std::optional<SlabFound> current(const SlabKey& key);
  u32 owner_first(const SlabOwner& owner);

  void list_append(Sum first, u32 start);
  void list_remove(Sum first, u32 start);
  void owner_append(u32 start, const SlabContent& content);
  void owner_remove(u32 start, const SlabContent& content);
  u64 used_by(const SlabOwner& owner);

  u32 granules_of(u64 bytes) const;
  void bin_append(u32 start, u32 granules);
  void bin_remove(u32 start, u32 granules);
  void free_extent(u32 start, u32 granules);
  u32 take_extent(u32 granules);

  void rest(u32 start, SlabContent content, double until);
  void unlist(u32 start, const SlabContent& content);
  void drop(u32 start, const SlabContent& content);
  bool evict(u32 start, const SlabContent& content);
  u32 evict_next();
  bool make_room_of(const SlabOwner& owner, u64 bytes);
  std::optional<SlabPlace> reserve_one(const SlabKey& key, u64 bytes, const SlabOwner& owner);
  bool publish_one(const SlabPut& put);
  void bury_pending(u64 rows);
  bool abandon_one(const SlabPlace& place);
  void reap();
  bool forgotten_since(const SlabOwner& owner, u64 moment) const;
  bool expired(const SlabContent& content) const { return content.time < expired_before_; }

  Shape shape_;
  SlabLock& lock_;
  u32 row_;
  SlabTable table_;
  SlabHeader* header_;
  SlabEntry* entries_;
  std::atomic<u32>* keys_;    // hash table of records
  std::atomic<u32>* owners_;  // each owner's first entry
  std::atomic<u32>* bins_;    // each length's first free extent
  std::atomic<u64>* bin_bits_;
  std::atomic<u64>* forgotten_;
  u32 slots_, most_extent_;

  std::mutex writing_;  // of this process's threads
  std::mutex following_;
  std::atomic<u64> epoch_{0}, seed_{0};
  std::atomic<double> clock_base_{0};  // the store's clock minus the machine's, in seconds
  std::array<u64, 2> boot_id_{};

  bool opened_ = false;     // then the row is this process's
  bool restarted_ = false;  // the machine has restarted since the entries were made

  // Of the current change.
  double now_ = 0, expired_before_ = 0;
  u64 quota_ = 0, evictions_ = 0;
};

}  // namespace lmc
