#include "slab_index.h"

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <random>
#include <system_error>
#include <thread>

namespace lmc {

enum SlabIndex::Sum : u32 {
  kSequence,  // of the next record
  kUsed,      // payload bytes of all records
  kFree,      // granules
  kRecords,
  kWaiting,  // entries that are pending or rest
  kOwners,
  kHand,  // the record that SIEVE looks at next; kNone: the queue's first
  kQueue,
  kQueueLast,
  kPending,
  kPendingLast,
  kResting,
  kRestingLast,
  kForgets,   // the number of `forget` calls so far
  kFloor,     // sequence of the last forgotten owner that is no longer listed
  kSeenTime,  // time of the last change, by the store's clock and by the wall clock: doubles
  kSeenWall,
  kSums
};

constexpr u32 kContentWords = 17;
constexpr u32 kFixedWords = sizeof(SlabFixed) / 8;
constexpr u32 kSumsRoom = 32;
constexpr u32 kMostProbes = 1024;    // far beyond any cluster at half load
constexpr u32 kMostSteps = 1 << 20;  // of the hand, per search
constexpr u32 kMostEvicted = 8;      // times the granules needed; evicting more for one payload does not pay
constexpr u32 kTagShift = 23;        // a slot of a hash table: 9 bits of the hash, then the granule + 1
constexpr char kMagic[8] = {'l', 'm', 'c', 'm', 'm', 0, '\r', '\n'};

struct SlabEntry {
  std::atomic<u64> content[kContentWords];
  std::atomic<u64> check;  // of content and place
  // Derived.
  std::atomic<u32> next, previous;  // in the list of its state, or of free extents of its length
  std::atomic<u32> run;             // granules of the free extent that begins or ends here
  std::atomic<u32> owner_next, owner_previous;
  std::atomic<u32> owner_last;   // only in an owner's first entry
  std::atomic<u64> owner_bytes;  // only in an owner's first entry
};
static_assert(sizeof(SlabEntry) == 176, "the index is a file format");

struct SlabHeader {
  std::atomic<u64> fixed[kFixedWords + 1];  // and their checksum
  std::atomic<u64> epoch;                   // changes with every rebuild
  std::atomic<u64> dirty;                   // nonzero during a change
  std::atomic<u64> moves;                   // odd while slots of a hash table move
  std::atomic<u64> rows_taken;              // one bit per row
  std::atomic<double> held_since;
  std::atomic<u64> sums[kSumsRoom];
  std::atomic<u64> sums_check;              // valid between changes
  std::atomic<u64> spare[kFixedWords + 1];  // a copy of `fixed`: one of the two is always whole
  std::atomic<u64> old_place;               // 1 + granule of the entry being overwritten, 0 for none
  std::atomic<u64> old[kContentWords + 1];  // its old content and check
};
static_assert(sizeof(SlabHeader) <= kHeaderBytes, "the header is a page");

namespace {

// All stores to memory that processes share, except pins and generations.
template <class T>
void put(std::atomic<T>& at, T value) {
  slab_hook();
  at.store(value, std::memory_order_release);
}

template <class T>
T see(const std::atomic<T>& at) {
  return at.load(std::memory_order_acquire);
}

// One step of a hash: a bijection in `hash` and in `word`, so that a change of one word always shows.
u64 stir(u64 hash, u64 word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15;
  return hash ^ (hash >> 29);
}

u64 bits_of(double value) {
  u64 bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

double double_of(u64 bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

u64 check_of(const u64 (&words)[kContentWords], u64 seed, u32 start) {
  u64 hash = stir(seed, start + u64{1});
  for (const u64 word : words) hash = stir(hash, word);
  return hash | 1;  // never 0, the check of an erased entry
}

u64 forgotten_check(const SlabOwner& owner, u64 sequence, u64 seed) {
  return stir(stir(stir(seed, owner[0]), owner[1]), sequence);
}

u64 fixed_check_of(const u64 (&words)[kFixedWords + 1]) {
  u64 hash = 0x6C6D636D6D203200;
  for (u32 i = 0; i < kFixedWords; ++i) hash = stir(hash, words[i]);
  return hash;
}

u64 align(u64 bytes) { return (bytes + 63) / 64 * 64; }

struct Layout {
  u64 entries, keys, owners, bins, bin_bits, forgotten, end;
};

Layout layout_of(const SlabIndex::Shape& shape) {
  const u64 granules = shape.granules, lengths = std::min(shape.granules, shape.segment_granules) + u64{1};
  Layout at{};
  at.entries = align(kHeaderBytes + granules * sizeof(SlotState));
  at.keys = align(at.entries + granules * sizeof(SlabEntry));
  at.owners = align(at.keys + granules * 8);
  at.bins = align(at.owners + granules * 8);
  at.bin_bits = align(at.bins + lengths * 4);
  at.forgotten = align(at.bin_bits + (lengths + 63) / 64 * 8);
  at.end = at.forgotten + u64{kForgotten} * 32;
  return at;
}

template <class T>
T* at(void* file, u64 offset) {
  return reinterpret_cast<T*>(static_cast<u8*>(file) + offset);
}

bool same_key(const SlabKey& a, const SlabKey& b) { return a.bytes == b.bytes && a.words == b.words; }

}  // namespace

// --- The lock

namespace {

struct flock record_lock(short type, u32 byte) {
  struct flock request{};
  request.l_type = type;
  request.l_whence = SEEK_SET;
  request.l_start = byte;
  request.l_len = 1;
  return request;
}

}  // namespace

u64 SlabLock::random() {
  std::random_device random;
  return (u64{random()} << 32) | random();
}

bool SlabFileLock::try_lock() {
  struct flock request = record_lock(F_WRLCK, byte_);
  if (fcntl(fd_, F_SETLK, &request) == 0) return true;
  if (errno == EAGAIN || errno == EACCES || errno == EINTR) return false;
  throw SlabBroken("the lock cannot be used: " + std::generic_category().message(errno));
}

void SlabFileLock::unlock() {
  struct flock request = record_lock(F_UNLCK, byte_);
  fcntl(fd_, F_SETLK, &request);
}

i64 SlabFileLock::holder_of(u32 byte) {
  struct flock request = record_lock(F_WRLCK, byte);
  if (fcntl(fd_, F_GETLK, &request) != 0 || request.l_type == F_UNLCK) return -1;
  return request.l_pid;
}

u64 SlabFileLock::alive() {
  u64 rows = 0;
  for (u32 row = 0; row < kSlabRows; ++row)
    if (holder_of(row) >= 0) rows |= u64{1} << row;
  return rows;
}

void SlabFileLock::wait(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

double SlabFileLock::seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Holds the lock against other threads and other processes.
class SlabIndex::Held {
 public:
  Held(SlabIndex& index, const SlabTerms& terms) : index_(index) {
    const double deadline = index.lock_.seconds() + terms.patience;
    double pause = 20e-6;
    while (!take()) {
      const double left = deadline - index.lock_.seconds();
      if (left <= 0) throw SlabBusy(who(terms));
      index.lock_.wait(std::min(pause, left));
      pause = std::min(2 * pause, 1e-3);
    }
    index.header_->held_since.store(terms.now, std::memory_order_relaxed);
  }
  ~Held() {
    index_.lock_.unlock();
    index_.writing_.unlock();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  bool take() {
    if (!index_.writing_.try_lock()) return false;
    try {
      if (index_.lock_.try_lock()) return true;
    } catch (...) {
      index_.writing_.unlock();
      throw;
    }
    index_.writing_.unlock();
    return false;
  }

  std::string who(const SlabTerms& terms) {
    const i64 pid = index_.lock_.holder();
    if (pid < 0) return "the index is busy";
    char text[128];
    std::snprintf(text, sizeof text, " has been changing the index for %.1f s; is it stopped?",
                  terms.now + terms.patience - index_.header_->held_since.load(std::memory_order_relaxed));
    return (pid ? "process " + std::to_string(pid) : std::string("a process of another PID namespace")) + text;
  }

  SlabIndex& index_;
};

// --- Opening

u64 SlabIndex::file_bytes(const Shape& shape) { return layout_of(shape).end; }

std::optional<SlabFixed> SlabIndex::fixed_of(const void* page) {
  for (const std::size_t copy : {offsetof(SlabHeader, fixed), offsetof(SlabHeader, spare)}) {
    u64 words[kFixedWords + 1];
    std::memcpy(words, static_cast<const u8*>(page) + copy, sizeof words);
    SlabFixed fixed;
    std::memcpy(&fixed, words, sizeof fixed);
    if (std::memcmp(fixed.magic, kMagic, sizeof kMagic) == 0 && words[kFixedWords] == fixed_check_of(words))
      return fixed;
  }
  return std::nullopt;
}

SlabIndex::SlabIndex(void* file, const Shape& shape, SlabLock& lock, u32 row)
    : shape_(shape), lock_(lock), row_(row), table_(at<SlotState>(file, kHeaderBytes), row) {
  const Layout layout = layout_of(shape);
  header_ = at<SlabHeader>(file, 0);
  entries_ = at<SlabEntry>(file, layout.entries);
  keys_ = at<std::atomic<u32>>(file, layout.keys);
  owners_ = at<std::atomic<u32>>(file, layout.owners);
  bins_ = at<std::atomic<u32>>(file, layout.bins);
  bin_bits_ = at<std::atomic<u64>>(file, layout.bin_bits);
  forgotten_ = at<std::atomic<u64>>(file, layout.forgotten);
  slots_ = 2 * shape.granules;
  most_extent_ = std::min(shape.granules, shape.segment_granules);
}

void SlabIndex::open(const std::array<u64, 2>& boot_id, bool keep, const SlabTerms& terms) {
  {
    Held held(*this, terms);
    const std::optional<SlabFixed> fixed = adopt();
    const bool restarted = fixed && fixed->boot_id != boot_id;
    boot_id_ = boot_id;
    // After a restart the store's clock continues from its last change, advanced by the wall clock's difference.
    const double gone = std::max(0.0, terms.wall - double_of(get(kSeenWall)));
    const double base = double_of(get(kSeenTime)) + gone - terms.now;
    const bool sums_hold = see(header_->dirty) != 0 || sums_check() == see(header_->sums_check);
    if (!fixed || (restarted && !(keep && sums_hold && base > -1e12 && base < 1e12))) {
      format();
    } else if (restarted) {
      clock_base_ = base;
      put(header_->dirty, u64{1});
      write_fixed();
      restarted_ = true;
    }
  }
  table_.clear_rows(u64{1} << row_, shape_.granules);  // left by the row's last process
  change(terms, [&] {
    bury_pending(u64{1} << row_);
    opened_ = true;
    header_->rows_taken.fetch_or(u64{1} << row_);
    return 0;
  });
}

// Takes seed and clock from the header; nothing if it is damaged, or belongs to another store.
std::optional<SlabFixed> SlabIndex::adopt() {
  u64 header[sizeof(SlabHeader) / 8] = {};
  for (u32 i = 0; i <= kFixedWords; ++i) {
    header[offsetof(SlabHeader, fixed) / 8 + i] = see(header_->fixed[i]);
    header[offsetof(SlabHeader, spare) / 8 + i] = see(header_->spare[i]);
  }
  const std::optional<SlabFixed> fixed = fixed_of(header);
  if (!fixed || fixed->version != kSlabVersion || fixed->rows != kSlabRows || fixed->granules != shape_.granules ||
      fixed->granule_bytes != shape_.granule_bytes || fixed->segment_granules != shape_.segment_granules)
    return std::nullopt;
  seed_ = fixed->seed;
  clock_base_ = fixed->clock_base;
  return fixed;
}

void SlabIndex::write_fixed() {
  SlabFixed fixed{};
  std::memcpy(fixed.magic, kMagic, sizeof kMagic);
  fixed.version = kSlabVersion;
  fixed.rows = kSlabRows;
  fixed.granules = shape_.granules;
  fixed.granule_bytes = shape_.granule_bytes;
  fixed.segment_granules = shape_.segment_granules;
  fixed.boot_id = boot_id_;
  fixed.clock_base = clock_base_;
  fixed.seed = seed_;
  u64 words[kFixedWords + 1];
  std::memcpy(words, &fixed, sizeof fixed);
  words[kFixedWords] = fixed_check_of(words);
  for (auto* copy : {&header_->spare, &header_->fixed})
    for (u32 i = 0; i <= kFixedWords; ++i) put((*copy)[i], words[i]);
}

// Makes the store empty after the next rebuild: no old entry is valid under the new seed.
void SlabIndex::format() {
  put(header_->dirty, u64{1});
  seed_ = lock_.random();
  clock_base_ = 0;
  write_fixed();
  set(kSequence, 0);
}

// After a rebuild, every process that has the store open reads the header again and restores its pins.
void SlabIndex::follow() {
  const u64 epoch = see(header_->epoch);
  if (epoch == epoch_.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(following_);
  if (epoch == epoch_.load(std::memory_order_relaxed) || !adopt()) return;
  table_.assert_pins(shape_.granules);
  epoch_ = epoch;
}

// --- Sums

u64 SlabIndex::get(Sum sum) const { return see(header_->sums[sum]); }

void SlabIndex::set(Sum sum, u64 value) { put(header_->sums[sum], value); }

u64 SlabIndex::sums_check() const {
  u64 hash = seed_;
  for (u32 sum = 0; sum < kSums; ++sum) hash = stir(hash, get(static_cast<Sum>(sum)));
  return hash;
}

u64 SlabIndex::moment() const { return get(kSequence); }

u64 SlabIndex::rows_taken() const { return see(header_->rows_taken); }

std::vector<std::pair<const char*, u64>> SlabIndex::sizes() const {
  return {{"capacity_bytes", u64{shape_.granules} * shape_.granule_bytes},
          {"used_bytes", get(kUsed)},
          {"free_bytes", get(kFree) * shape_.granule_bytes},
          {"records", get(kRecords)},
          {"pending", get(kWaiting)},
          {"owners", get(kOwners)}};
}

// --- Changes

template <class Work>
std::invoke_result_t<Work&> SlabIndex::change(const SlabTerms& terms, Work work) {
  Held held(*this, terms);
  for (int attempt = 0;; ++attempt) {
    try {
      begin(terms);
      auto result = work();
      end();
      return result;
    } catch (const Damage&) {
      if (attempt == 2) throw SlabBroken("the index is damaged again and again");
    }  // the mark stays: the next attempt begins with a rebuild
  }
}

void SlabIndex::begin(const SlabTerms& terms) {
  expect_all();
  const bool known = adopt().has_value();
  if (!known || !std::equal(header_->fixed, header_->fixed + kFixedWords + 1, header_->spare)) write_fixed();
  if (!known || see(header_->dirty) != 0 || sums_check() != see(header_->sums_check)) rebuild(terms);
  follow();
  put(header_->dirty, u64{1});
  if (opened_ && !(rows_taken() >> row_ & 1)) header_->rows_taken.fetch_or(u64{1} << row_);
  now_ = terms.now + clock_base_;
  expired_before_ = terms.ttl ? now_ - terms.ttl : -1e300;
  quota_ = terms.quota;
  evictions_ = 0;
  set(kSeenTime, bits_of(std::max(now_, double_of(get(kSeenTime)))));
  set(kSeenWall, bits_of(terms.wall));
}

// Only this process would see its writes to lost pages, so it makes no more changes, and leaves its mark.
void SlabIndex::expect_all() {
  if (lock_.lost()) throw SlabBroken("a part of its file is lost: close the store and open it again");
}

void SlabIndex::end() {
  expect_all();
  put(header_->sums_check, sums_check());
  put(header_->dirty, u64{0});
}

// Rebuilds all derived data from the entries, and drops invalid ones. A process that dies here leaves the mark, and the
// next one begins again.
void SlabIndex::rebuild(const SlabTerms& terms) {
  put(header_->dirty, u64{1});
  put(header_->moves, see(header_->moves) | 1);  // odd: a reader that misses tries again, three times in all
  const u64 alive = restarted_ ? 0 : lock_.alive() | (opened_ ? u64{1} << row_ : 0);
  now_ = terms.now + clock_base_;
  table_.clear_rows(~alive, shape_.granules);
  restore_old();

  struct Live {
    u64 sequence;
    u32 start;
  };
  std::vector<Live> live;
  u64 sequence = 0;
  double seen = now_;
  u32 covered = 0;  // by the entries that stay
  for (u32 start = 0; start < shape_.granules; ++start) {
    SlabEntry& entry = entries_[start];
    if (see(entry.run) != 0) put(entry.run, 0u);
    bool valid;
    SlabContent content = load(start, &valid);
    if (valid) {
      sequence = std::max(sequence, content.sequence + 1);
      if (restarted_) {
        valid = content.state == SlabState::kRecord;
        if (valid) table_.set_generation(start, content.generation);
      } else if (content.state == SlabState::kRecord && table_.generation(start) != content.generation) {
        // Its removal had begun; processes that have it pinned may still read it.
        valid = table_.pinned(start);
        content.state = SlabState::kResting;
        content.owner = {};
        content.time = now_;
        if (valid) store(start, content);
      } else if (content.state == SlabState::kPending && !(alive >> content.row & 1)) {
        content.state = SlabState::kResting;
        content.owner = {};
        content.time = now_ + kRestSeconds;
        store(start, content);
      } else if (content.state == SlabState::kResting && content.time > now_ + kRestSeconds) {
        content.time = now_ + kRestSeconds;  // a power cut set the store's clock back
        store(start, content);
      }
    }
    if (valid && start < covered) {  // if two overlap, the newer one stays
      if (content.sequence > live.back().sequence) {
        erase(live.back().start);
        live.pop_back();
      } else {
        valid = false;
      }
    }
    if (valid) {
      if (content.state == SlabState::kRecord) seen = std::max(seen, content.time);
      live.push_back({content.sequence, start});
      covered = start + content.granules;
    } else if (see(entry.check) != 0) {
      erase(start);
    }
  }
  for (u32 slot = 0; slot < slots_; ++slot) {
    if (see(keys_[slot]) != 0) put(keys_[slot], 0u);
    if (see(owners_[slot]) != 0) put(owners_[slot], 0u);
  }
  for (u32 granules = 0; granules <= most_extent_; ++granules) {
    put(bins_[granules], kNone);
    if (granules % 64 == 0) put(bin_bits_[granules / 64], u64{0});
  }

  // Puts in progress hold sequences and compare them with this one. Microseconds since 1970 exceed all earlier ones.
  const u64 before = get(kSequence), clock = static_cast<u64>(std::max(terms.wall, 0.0) * 1e6);
  sequence = std::max(sequence, clock);
  if (before < sequence + (u64{1} << 40)) sequence = std::max(sequence, before + 1);
  set(kSequence, sequence);  // at once and never to 0, so that it cannot go back if this process dies here
  for (u32 sum = kSequence + 1; sum < kSums; ++sum)
    if (sum != kSeenTime && sum != kSeenWall) set(static_cast<Sum>(sum), 0);
  for (const Sum sum : {kHand, kQueue, kQueueLast, kPending, kPendingLast, kResting, kRestingLast}) set(sum, kNone);
  set(kFloor, sequence);  // any owner may have been forgotten since puts in progress began
  set(kSeenTime, bits_of(seen));
  set(kSeenWall, bits_of(terms.wall));

  std::sort(live.begin(), live.end(), [](const Live& a, const Live& b) { return a.sequence < b.sequence; });
  for (const Live& one : live) {
    const SlabContent content = need(one.start);
    if (content.state == SlabState::kRecord) {
      if (const auto older = there(content.key)) drop(older->start, *older);
      hash_insert(keys_, key_hash(content.key), one.start);
      list_append(kQueue, one.start);
      owner_append(one.start, content);
      add(kRecords, 1);
      add(kUsed, static_cast<i64>(content.payload_bytes));
    } else {
      list_append(content.state == SlabState::kPending ? kPending : kResting, one.start);
      if (content.state == SlabState::kPending) owner_append(one.start, content);
      add(kWaiting, 1);
    }
  }
  set(kHand, get(kQueue));

  // Free extents: the gaps between entries, split at the ends of segments.
  u32 at = 0;
  const auto free_up_to = [&](u32 limit) {
    while (at < limit) {
      const u32 until = std::min(limit, (at / shape_.segment_granules + 1) * shape_.segment_granules);
      bin_append(at, until - at);
      for (; at < until; ++at) table_.retire(at);  // the old generation must not match again
    }
  };
  // Start over with empty bins: `drop` above may have freed the older of two records of one key.
  for (u32 granules = 1; granules <= most_extent_; ++granules)
    for (u32 start = see(bins_[granules]); start != kNone; start = see(bins_[granules])) bin_remove(start, granules);
  std::sort(live.begin(), live.end(), [](const Live& a, const Live& b) { return a.start < b.start; });
  for (const Live& one : live) {
    bool valid;
    const SlabContent content = load(one.start, &valid);
    if (!valid) continue;
    free_up_to(one.start);
    at = one.start + content.granules;
  }
  free_up_to(shape_.granules);
  put(header_->moves, see(header_->moves) + 1);
  put(header_->epoch, see(header_->epoch) + 1);
  restarted_ = false;
  end();
}

// --- Entries

SlabContent SlabIndex::load(u32 start, bool* valid) const {
  const SlabEntry& entry = entries_[start];
  const u64 check = see(entry.check);
  SlabContent content;
  if (check == 0) {
    *valid = false;
    return content;
  }
  u64 words[kContentWords];
  for (u32 i = 0; i < kContentWords; ++i) words[i] = see(entry.content[i]);
  std::copy(words, words + 8, content.key.words.begin());
  content.key.bytes = static_cast<u32>(words[8]);
  content.state = static_cast<SlabState>(words[8] >> 32);
  content.granules = static_cast<u32>(words[9]);
  content.row = static_cast<u32>(words[9] >> 32);
  content.generation = static_cast<u32>(words[10]);
  content.payload_bytes = words[11];
  content.checksum = static_cast<i64>(words[12]);
  content.owner = {words[13], words[14]};
  content.time = double_of(words[15]);
  content.sequence = words[16];
  *valid = check == check_of(words, seed_, start) && fits(start, content);
  return content;
}

bool SlabIndex::fits(u32 start, const SlabContent& content) const {
  const u32 segment = shape_.segment_granules;
  return content.state >= SlabState::kPending && content.state <= SlabState::kResting && content.row < kSlabRows &&
         content.granules >= 1 && content.granules <= most_extent_ && content.granules <= shape_.granules - start &&
         start % segment + content.granules <= segment && content.granules == granules_of(content.payload_bytes) &&
         content.key.bytes <= 64;
}

SlabContent SlabIndex::need(u32 start) const {
  expect(start < shape_.granules);
  bool valid;
  const SlabContent content = load(start, &valid);
  expect(valid);
  return content;
}

void SlabIndex::store(u32 start, const SlabContent& content) {
  u64 words[kContentWords];
  std::copy(content.key.words.begin(), content.key.words.end(), words);
  words[8] = content.key.bytes | static_cast<u64>(content.state) << 32;
  words[9] = content.granules | u64{content.row} << 32;
  words[10] = content.generation;
  words[11] = content.payload_bytes;
  words[12] = static_cast<u64>(content.checksum);
  words[13] = content.owner[0];
  words[14] = content.owner[1];
  words[15] = bits_of(content.time);
  words[16] = content.sequence;
  SlabEntry& entry = entries_[start];
  if (see(entry.check)) {  // its slot may be pinned, or written to by a device: it stays taken if a process dies here
    for (u32 i = 0; i < kContentWords; ++i) put(header_->old[i], see(entry.content[i]));
    put(header_->old[kContentWords], see(entry.check));
    put(header_->old_place, u64{start} + 1);
  }
  put(entry.check, u64{0});
  for (u32 i = 0; i < kContentWords; ++i) put(entry.content[i], words[i]);
  put(entry.check, check_of(words, seed_, start));
  put(header_->old_place, u64{0});
}

// Undoes a `store` that a dead writer left half done.
void SlabIndex::restore_old() {
  const u64 place = see(header_->old_place);
  if (place == 0) return;
  u64 words[kContentWords];
  for (u32 i = 0; i < kContentWords; ++i) words[i] = see(header_->old[i]);
  const u64 check = see(header_->old[kContentWords]);
  const u32 start = static_cast<u32>(place - 1);
  if (place <= shape_.granules && see(entries_[start].check) == 0 && check == check_of(words, seed_, start)) {
    for (u32 i = 0; i < kContentWords; ++i) put(entries_[start].content[i], words[i]);
    put(entries_[start].check, check);
  }
  put(header_->old_place, u64{0});
}

void SlabIndex::erase(u32 start) { put(entries_[start].check, u64{0}); }

// --- Hash tables: open addressing, at most half full

u64 SlabIndex::key_hash(const SlabKey& key) const {
  u64 hash = stir(seed_, key.bytes);
  for (const u64 word : key.words) hash = stir(hash, word);
  return stir(hash, seed_);
}

u64 SlabIndex::owner_hash(const SlabOwner& owner) const {
  return stir(stir(stir(seed_ + 1, owner[0]), owner[1]), seed_);
}

u32 SlabIndex::hash_place(u64 hash) const { return static_cast<u32>((hash & 0xFFFFFFFF) * slots_ >> 32); }

u32 SlabIndex::hash_value(u64 hash, u32 start) const { return static_cast<u32>(hash >> 55) << kTagShift | (start + 1); }

void SlabIndex::hash_insert(std::atomic<u32>* slots, u64 hash, u32 start) {
  u32 place = hash_place(hash);
  for (u32 probe = 0; probe < std::min(slots_, kMostProbes); ++probe) {
    if (see(slots[place]) == 0) {
      put(slots[place], hash_value(hash, start));
      return;
    }
    place = place + 1 == slots_ ? 0 : place + 1;
  }
  throw Damage{};
}

void SlabIndex::hash_remove(std::atomic<u32>* slots, u64 hash, u32 start, const HashOf& hash_of) {
  u32 gap = hash_place(hash), probe = 0;
  for (; see(slots[gap]) != hash_value(hash, start); ++probe) {
    expect(see(slots[gap]) != 0 && probe < std::min(slots_, kMostProbes));
    gap = gap + 1 == slots_ ? 0 : gap + 1;
  }
  // Later slots move up, as far as their own hashes allow.
  put(header_->moves, see(header_->moves) + 1);
  u32 place = gap;
  for (probe = 0;; ++probe) {
    place = place + 1 == slots_ ? 0 : place + 1;
    const u32 value = see(slots[place]);
    if (value == 0) break;
    expect(probe < std::min(slots_, kMostProbes));
    const u32 home = hash_place(hash_of((value & ((1u << kTagShift) - 1)) - 1));
    const bool stays = gap <= place ? gap < home && home <= place : gap < home || home <= place;
    if (stays) continue;
    put(slots[gap], value);
    gap = place;
  }
  put(slots[gap], 0u);
  put(header_->moves, see(header_->moves) + 1);
}

std::optional<SlabFound> SlabIndex::find(const SlabKey& key, double now, double ttl) {
  follow();
  for (int attempt = 0; attempt < 3; ++attempt) {
    const u64 moves = see(header_->moves), hash = key_hash(key);
    u32 place = hash_place(hash);
    for (u32 probe = 0; probe < std::min(slots_, kMostProbes); ++probe) {
      const u32 value = see(keys_[place]);
      if (value == 0) break;
      const u32 start = (value & ((1u << kTagShift) - 1)) - 1;
      if (value == hash_value(hash, start) && start < shape_.granules) {
        bool valid;
        SlabFound found;
        static_cast<SlabContent&>(found) = load(start, &valid);
        found.start = start;
        if (valid && found.state == SlabState::kRecord && same_key(found.key, key)) {
          if (ttl && age(found, now) > ttl) return std::nullopt;
          return found;
        }
      }
      place = place + 1 == slots_ ? 0 : place + 1;
    }
    if (moves % 2 == 0 && see(header_->moves) == moves) break;  // else the record may have moved past us
  }
  return std::nullopt;
}

// As find, for the holder of the lock.
std::optional<SlabFound> SlabIndex::there(const SlabKey& key) {
  const u64 hash = key_hash(key);
  u32 place = hash_place(hash);
  for (u32 probe = 0; probe < std::min(slots_, kMostProbes); ++probe) {
    const u32 value = see(keys_[place]);
    if (value == 0) return std::nullopt;
    const u32 start = (value & ((1u << kTagShift) - 1)) - 1;
    if (value == hash_value(hash, start)) {
      SlabFound found;
      static_cast<SlabContent&>(found) = need(start);
      found.start = start;
      expect(found.state == SlabState::kRecord);
      if (same_key(found.key, key)) return found;
    }
    place = place + 1 == slots_ ? 0 : place + 1;
  }
  throw Damage{};
}

// The record of a key; drops it and returns none if it has expired or has been evicted.
std::optional<SlabFound> SlabIndex::current(const SlabKey& key) {
  const std::optional<SlabFound> found = there(key);
  if (!found || (table_.generation(found->start) == found->generation && !expired(*found))) return found;
  drop(found->start, *found);
  return std::nullopt;
}

// --- Lists

void SlabIndex::list_append(Sum first, u32 start) {
  const Sum last = static_cast<Sum>(first + 1);
  const u64 before = get(last);
  SlabEntry& entry = entries_[start];
  put(entry.next, kNone);
  put(entry.previous, static_cast<u32>(before));
  if (before == kNone) {
    expect(get(first) == kNone);
    set(first, start);
  } else {
    expect(before < shape_.granules && see(entries_[before].next) == kNone);
    put(entries_[before].next, start);
  }
  set(last, start);
  if (first == kQueue && get(kHand) == kNone) set(kHand, start);
}

void SlabIndex::list_remove(Sum first, u32 start) {
  const Sum last = static_cast<Sum>(first + 1);
  const u32 next = see(entries_[start].next), previous = see(entries_[start].previous);
  expect(previous == kNone ? get(first) == start : previous < shape_.granules && see(entries_[previous].next) == start);
  expect(next == kNone ? get(last) == start : next < shape_.granules && see(entries_[next].previous) == start);
  if (first == kQueue && get(kHand) == start) set(kHand, next);
  if (previous == kNone)
    set(first, next);
  else
    put(entries_[previous].next, next);
  if (next == kNone)
    set(last, previous);
  else
    put(entries_[next].previous, previous);
}

// The first entry of an owner, kNone if there is none.
u32 SlabIndex::owner_first(const SlabOwner& owner) {
  const u64 hash = owner_hash(owner);
  u32 place = hash_place(hash);
  for (u32 probe = 0; probe < std::min(slots_, kMostProbes); ++probe) {
    const u32 value = see(owners_[place]);
    if (value == 0) return kNone;
    const u32 start = (value & ((1u << kTagShift) - 1)) - 1;
    if (value == hash_value(hash, start) && need(start).owner == owner) return start;
    place = place + 1 == slots_ ? 0 : place + 1;
  }
  throw Damage{};
}

u64 SlabIndex::used_by(const SlabOwner& owner) {
  const u32 first = owner_first(owner);
  return first == kNone ? 0 : see(entries_[first].owner_bytes);
}

void SlabIndex::owner_append(u32 start, const SlabContent& content) {
  if (content.owner == SlabOwner{}) return;
  const u32 first = owner_first(content.owner);
  SlabEntry& entry = entries_[start];
  put(entry.owner_next, kNone);
  if (first == kNone) {
    put(entry.owner_previous, kNone);
    put(entry.owner_last, start);
    put(entry.owner_bytes, content.payload_bytes);
    hash_insert(owners_, owner_hash(content.owner), start);
    add(kOwners, 1);
    return;
  }
  const u32 last = see(entries_[first].owner_last);
  expect(last < shape_.granules && see(entries_[last].owner_next) == kNone);
  put(entry.owner_previous, last);
  put(entries_[last].owner_next, start);
  put(entries_[first].owner_last, start);
  put(entries_[first].owner_bytes, see(entries_[first].owner_bytes) + content.payload_bytes);
}

void SlabIndex::owner_remove(u32 start, const SlabContent& content) {
  if (content.owner == SlabOwner{}) return;
  const u32 first = owner_first(content.owner);
  expect(first != kNone);
  const u32 next = see(entries_[start].owner_next), previous = see(entries_[start].owner_previous);
  const u32 last = see(entries_[first].owner_last);
  const u64 bytes = see(entries_[first].owner_bytes) - content.payload_bytes;
  expect(next == kNone || (next < shape_.granules && see(entries_[next].owner_previous) == start));
  if (first != start) {
    expect(previous < shape_.granules && see(entries_[previous].owner_next) == start);
    expect((next == kNone) == (last == start));
    put(entries_[previous].owner_next, next);
    if (next == kNone)
      put(entries_[first].owner_last, previous);
    else
      put(entries_[next].owner_previous, previous);
    put(entries_[first].owner_bytes, bytes);
    return;
  }
  const u64 hash = owner_hash(content.owner);
  if (next == kNone) {
    expect(bytes == 0);
    hash_remove(owners_, hash, start, [this](u32 other) { return owner_hash(need(other).owner); });
    add(kOwners, -1);
    return;
  }
  put(entries_[next].owner_previous, kNone);
  put(entries_[next].owner_last, last);
  put(entries_[next].owner_bytes, bytes);
  u32 place = hash_place(hash);
  for (u32 probe = 0; see(owners_[place]) != hash_value(hash, start); ++probe) {
    expect(probe < std::min(slots_, kMostProbes));
    place = place + 1 == slots_ ? 0 : place + 1;
  }
  put(owners_[place], hash_value(hash, next));
}

// --- Room

u32 SlabIndex::granules_of(u64 bytes) const {
  const u64 granules = bytes / shape_.granule_bytes + (bytes % shape_.granule_bytes != 0);
  return static_cast<u32>(std::clamp<u64>(granules, 1, kNone));
}

void SlabIndex::bin_append(u32 start, u32 granules) {
  const u32 first = see(bins_[granules]);
  SlabEntry& entry = entries_[start];
  put(entry.next, first);
  put(entry.previous, kNone);
  if (first != kNone) {
    expect(first < shape_.granules && see(entries_[first].previous) == kNone);
    put(entries_[first].previous, start);
  }
  put(entry.run, granules);
  put(entries_[start + granules - 1].run, granules);
  put(bins_[granules], start);
  put(bin_bits_[granules / 64], see(bin_bits_[granules / 64]) | u64{1} << granules % 64);
  add(kFree, granules);
}

void SlabIndex::bin_remove(u32 start, u32 granules) {
  expect(start < shape_.granules && granules >= 1 && granules <= most_extent_ &&
         start % shape_.segment_granules + granules <= shape_.segment_granules && granules <= shape_.granules - start &&
         see(entries_[start].run) == granules && see(entries_[start + granules - 1].run) == granules);
  const u32 next = see(entries_[start].next), previous = see(entries_[start].previous);
  expect(previous == kNone ? see(bins_[granules]) == start
                           : previous < shape_.granules && see(entries_[previous].next) == start);
  expect(next == kNone || (next < shape_.granules && see(entries_[next].previous) == start));
  if (previous == kNone) {
    put(bins_[granules], next);
    if (next == kNone) put(bin_bits_[granules / 64], see(bin_bits_[granules / 64]) & ~(u64{1} << granules % 64));
  } else {
    put(entries_[previous].next, next);
  }
  if (next != kNone) put(entries_[next].previous, previous);
  put(entries_[start].run, 0u);
  put(entries_[start + granules - 1].run, 0u);
  add(kFree, -i64{granules});
}

// Frees an extent, joined with free neighbors in its segment.
void SlabIndex::free_extent(u32 start, u32 granules) {
  const u32 end = start + granules, segment = shape_.segment_granules;
  if (end % segment && end < shape_.granules) {
    if (const u32 more = see(entries_[end].run)) {
      bin_remove(end, more);
      granules += more;
    }
  }
  if (start % segment) {
    if (const u32 more = see(entries_[start - 1].run)) {
      expect(more <= start);
      bin_remove(start - more, more);
      start -= more;
      granules += more;
    }
  }
  expect(granules <= most_extent_);
  bin_append(start, granules);
}

// Takes from the smallest extent that suffices; kNone if there is none.
u32 SlabIndex::take_extent(u32 granules) {
  for (u32 word = granules / 64; word <= most_extent_ / 64; ++word) {
    u64 bits = see(bin_bits_[word]);
    if (word == granules / 64) bits &= ~u64{0} << granules % 64;
    if (!bits) continue;
    const u32 found = word * 64 + static_cast<u32>(__builtin_ctzll(bits));
    expect(found <= most_extent_);
    const u32 start = see(bins_[found]);
    bin_remove(start, found);
    if (found > granules) bin_append(start + granules, found - granules);
    return start;
  }
  return kNone;
}

// --- Ends

// The place becomes free after `until`, once nobody has it pinned.
void SlabIndex::rest(u32 start, SlabContent content, double until) {
  content.state = SlabState::kResting;
  content.owner = {};
  content.time = until;
  store(start, content);
  list_append(kResting, start);
  add(kWaiting, 1);
}

void SlabIndex::reap() {
  u32 start = static_cast<u32>(get(kResting));
  for (u32 step = 0; start != kNone; ++step) {
    expect(step < shape_.granules);
    const SlabContent content = need(start);
    expect(content.state == SlabState::kResting);
    const u32 next = see(entries_[start].next);
    if (content.time <= now_ && !table_.pinned(start)) {
      list_remove(kResting, start);
      add(kWaiting, -1);
      erase(start);
      free_extent(start, content.granules);
    }
    start = next;
  }
}

// Removes the key at once, and the slot as soon as nobody has it pinned.
void SlabIndex::drop(u32 start, const SlabContent& content) {
  if (table_.generation(start) == content.generation) table_.retire(start);
  hash_remove(keys_, key_hash(content.key), start, [this](u32 other) { return key_hash(need(other).key); });
  list_remove(kQueue, start);
  owner_remove(start, content);
  add(kRecords, -1);
  add(kUsed, -static_cast<i64>(content.payload_bytes));
  if (table_.pinned(start)) {
    rest(start, content, now_);
  } else {
    erase(start);
    free_extent(start, content.granules);
  }
}

// Returns false if it is pinned.
bool SlabIndex::evict(u32 start, const SlabContent& content) {
  if (table_.generation(start) == content.generation && !table_.evict(start)) return false;
  drop(start, content);
  ++evictions_;
  return true;
}

// Evicts one record. Returns how many granules it had, 0 if none can be evicted.
//
// SIEVE: from the hand on towards newer records, the first that was not used since the hand's last visit.
// Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.
u32 SlabIndex::evict_next() {
  u64 steps = std::min<u64>(2 * get(kRecords) + 1, kMostSteps);
  u32 start = static_cast<u32>(get(kHand));
  for (; steps > 0; --steps) {
    if (start == kNone) start = static_cast<u32>(get(kQueue));
    if (start == kNone) return 0;
    const SlabContent content = need(start);
    expect(content.state == SlabState::kRecord);
    const u32 next = see(entries_[start].next);
    const bool spared = table_.take_visited(start) && !expired(content);
    if (!spared && evict(start, content)) {
      set(kHand, next);
      return content.granules;
    }
    start = next;
  }
  set(kHand, start);
  return 0;
}

// Evicts an owner's oldest records until `bytes` more are within its quota.
bool SlabIndex::make_room_of(const SlabOwner& owner, u64 bytes) {
  if (bytes > quota_) return false;
  u32 start = owner_first(owner);
  for (u32 step = 0; used_by(owner) + bytes > quota_; ++step) {
    if (start == kNone) return false;
    expect(step < shape_.granules);
    const SlabContent content = need(start);
    const u32 next = see(entries_[start].owner_next);
    if (content.state == SlabState::kRecord) evict(start, content);
    start = next;
  }
  return true;
}

// --- Operations of stores

SlabIndex::Reserved SlabIndex::reserve(const std::vector<SlabKey>& keys, const std::vector<u64>& sizes,
                                       const SlabOwner& owner, const std::vector<SlabPlace>& given_back,
                                       const SlabTerms& terms) {
  return change(terms, [&] {
    Reserved reserved;
    reap();
    for (const SlabPlace& place : given_back) abandon_one(place);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      reserved.places.emplace_back();
      if (current(keys[i])) continue;
      reserved.places.back() = reserve_one(keys[i], sizes[i], owner);
      reserved.dropped += !reserved.places.back();
    }
    reserved.moment = get(kSequence);
    reserved.evictions = evictions_;
    return reserved;
  });
}

std::optional<SlabPlace> SlabIndex::reserve_one(const SlabKey& key, u64 bytes, const SlabOwner& owner) {
  const u32 granules = granules_of(bytes);
  if (granules > most_extent_) return std::nullopt;
  if (owner != SlabOwner{} && quota_ && !make_room_of(owner, bytes)) return std::nullopt;
  i64 patience = i64{kMostEvicted} * granules;
  u32 start;
  while ((start = take_extent(granules)) == kNone) {
    const u32 freed = patience > 0 ? evict_next() : 0;
    if (freed == 0) {
      expect(get(kRecords) != 0 || get(kWaiting) != 0);  // an empty store has room
      return std::nullopt;
    }
    patience -= freed;
  }
  SlabContent content;
  content.key = key;
  content.state = SlabState::kPending;
  content.granules = granules;
  content.row = row_;
  content.generation = table_.generation(start);
  content.payload_bytes = bytes;
  content.owner = owner;
  content.time = now_;
  content.sequence = get(kSequence);
  store(start, content);
  list_append(kPending, start);
  owner_append(start, content);
  add(kWaiting, 1);
  return SlabPlace{start, content.generation};
}

u64 SlabIndex::publish(const std::vector<SlabPut>& puts, const SlabTerms& terms) {
  return change(terms, [&] {
    u64 published = 0;
    // Records come as prefixes, shortest first. A chunk is useless without those before it, so it is evicted first.
    for (auto one = puts.rbegin(); one != puts.rend(); ++one) published += publish_one(*one);
    return published;
  });
}

bool SlabIndex::publish_one(const SlabPut& put) {
  const u32 start = put.place.start;
  bool valid = false;
  SlabContent content;
  if (start < shape_.granules) content = load(start, &valid);
  if (!valid || content.generation != put.place.generation || table_.generation(start) != content.generation ||
      !same_key(content.key, put.key) || content.row != row_)
    return false;
  if (content.state == SlabState::kRecord) return true;  // done by an attempt that then found damage
  if (content.state != SlabState::kPending) return false;
  if (current(put.key) || forgotten_since(content.owner, put.as_of)) {
    abandon_one(put.place);
    return false;
  }
  list_remove(kPending, start);
  add(kWaiting, -1);
  table_.take_visited(start);  // left by the slot's last record
  content.state = SlabState::kRecord;
  content.checksum = put.checksum;
  content.time = now_ - std::max(put.age, 0.0);
  content.sequence = get(kSequence);
  set(kSequence, content.sequence + 1);
  store(start, content);
  hash_insert(keys_, key_hash(put.key), start);
  list_append(kQueue, start);
  add(kRecords, 1);
  add(kUsed, static_cast<i64>(content.payload_bytes));
  return true;
}

u64 SlabIndex::abandon(const std::vector<SlabPlace>& places, const SlabTerms& terms) {
  return change(terms, [&] {
    u64 abandoned = 0;
    for (const SlabPlace& place : places) abandoned += abandon_one(place);
    return abandoned;
  });
}

bool SlabIndex::abandon_one(const SlabPlace& place) {
  bool valid = false;
  SlabContent content;
  if (place.start < shape_.granules) content = load(place.start, &valid);
  if (!valid || content.state != SlabState::kPending || content.generation != place.generation || content.row != row_)
    return false;
  owner_remove(place.start, content);
  list_remove(kPending, place.start);
  add(kWaiting, -1);
  table_.retire(place.start);
  erase(place.start);
  free_extent(place.start, content.granules);
  return true;
}

u64 SlabIndex::remove(const std::vector<SlabKey>& keys, const SlabTerms& terms) {
  return change(terms, [&] {
    u64 removed = 0;
    for (const SlabKey& key : keys)
      if (const auto found = current(key)) {
        drop(found->start, *found);
        ++removed;
      }
    return removed;
  });
}

void SlabIndex::discard(const SlabKey& key, const SlabPlace& place, const SlabTerms& terms) {
  change(terms, [&] {
    const auto found = current(key);
    if (found && found->start == place.start && found->generation == place.generation) drop(found->start, *found);
    return 0;
  });
}

u64 SlabIndex::forget(const SlabOwner& owner, const SlabTerms& terms) {
  return change(terms, [&] {
    const u64 sequence = get(kSequence) + 1, forgets = get(kForgets);
    set(kSequence, sequence);
    std::atomic<u64>* one = forgotten_ + forgets % kForgotten * 4;
    if (forgets >= kForgotten) set(kFloor, std::max(get(kFloor), see(one[2])));
    put(one[0], owner[0]);
    put(one[1], owner[1]);
    put(one[2], sequence);
    put(one[3], forgotten_check(owner, sequence, seed_));
    set(kForgets, forgets + 1);
    u64 removed = 0;
    u32 start = owner_first(owner);
    for (u32 step = 0; start != kNone; ++step) {
      expect(step < shape_.granules);
      const SlabContent content = need(start);
      expect(content.owner == owner);
      const u32 next = see(entries_[start].owner_next);
      if (content.state == SlabState::kRecord) {
        drop(start, content);
        ++removed;
      }
      start = next;
    }
    return removed;
  });
}

// Whether the owner was, or may have been, forgotten after that moment.
bool SlabIndex::forgotten_since(const SlabOwner& owner, u64 moment) const {
  if (owner == SlabOwner{}) return false;
  if (moment < get(kFloor) || moment > get(kSequence)) return true;
  const u64 forgets = get(kForgets);
  for (u64 back = 1; back <= std::min<u64>(forgets, kForgotten); ++back) {
    const std::atomic<u64>* one = forgotten_ + (forgets - back) % kForgotten * 4;
    const SlabOwner whose{see(one[0]), see(one[1])};
    expect(see(one[3]) == forgotten_check(whose, see(one[2]), seed_));
    if (see(one[2]) <= moment) return false;
    if (whose == owner) return true;
  }
  return false;
}

u64 SlabIndex::clear(const SlabTerms& terms) {
  return change(terms, [&] {
    u64 removed = 0;
    for (u32 start; (start = static_cast<u32>(get(kQueue))) != kNone; ++removed) drop(start, need(start));
    reap();
    return removed;
  });
}

void SlabIndex::bury(u64 rows, const SlabTerms& terms) {
  table_.clear_rows(rows, shape_.granules);
  change(terms, [&] {
    bury_pending(rows);
    slab_hook();
    header_->rows_taken.fetch_and(~rows);
    return 0;
  });
}

void SlabIndex::close(const SlabTerms& terms) {
  table_.unpin_all();
  change(terms, [&] {
    bury_pending(u64{1} << row_);
    opened_ = false;
    slab_hook();
    header_->rows_taken.fetch_and(~(u64{1} << row_));
    return 0;
  });
}

void SlabIndex::bury_pending(u64 rows) {
  u32 start = static_cast<u32>(get(kPending));
  for (u32 step = 0; start != kNone; ++step) {
    expect(step < shape_.granules);
    const SlabContent content = need(start);
    expect(content.state == SlabState::kPending);
    const u32 next = see(entries_[start].next);
    if (rows >> content.row & 1) {
      owner_remove(start, content);
      list_remove(kPending, start);
      add(kWaiting, -1);
      table_.retire(start);
      rest(start, content, now_ + kRestSeconds);
    }
    start = next;
  }
}

// --- For tests

std::string SlabIndex::check(const SlabTerms& terms) {
  Held held(*this, terms);
  if (see(header_->dirty)) return "a change was not finished";
  if (!adopt()) return "the header is damaged";
  if (sums_check() != see(header_->sums_check)) return "the sums are damaged";
  const u32 granules = shape_.granules;
  u64 free = 0, records = 0, waiting = 0, used = 0, owned = 0;
  std::vector<u32> lists(3, 0);
  bool free_before = false;
  for (u32 start = 0; start < granules;) {
    const std::string where = " at granule " + std::to_string(start);
    bool valid;
    const SlabContent content = load(start, &valid);
    const u32 run = see(entries_[start].run);
    if (start % shape_.segment_granules == 0) free_before = false;
    if (valid == (run != 0)) return (valid ? "both used and free" : "neither used nor free") + where;
    const u32 length = valid ? content.granules : run;
    if (length > granules - start || length > most_extent_) return "too long" + where;
    for (u32 i = 1; i < length; ++i) {
      if (see(entries_[start + i].check)) return "an entry within another" + where;
      if (see(entries_[start + i].run) != (!valid && i + 1 == length ? run : 0)) return "an extent within" + where;
    }
    if (!valid) {
      if (free_before) return "extents that are not joined" + where;
      u32 one = see(bins_[run]);
      while (one != start && one < granules) one = see(entries_[one].next);
      if (one != start) return "an extent that is in no bin" + where;
      free += run;
    } else if (content.state == SlabState::kRecord) {
      const auto found = find(content.key, terms.now, 0);
      if (!found || found->start != start) return "a record that is not found" + where;
      if (table_.generation(start) != content.generation) return "a record of another generation" + where;
      ++records, ++lists[0], used += content.payload_bytes;
    } else {
      ++waiting, ++lists[content.state == SlabState::kPending ? 1 : 2];
    }
    if (valid && content.owner != SlabOwner{}) owned += content.payload_bytes;
    free_before = !valid;
    start += length;
  }
  const std::array<std::pair<Sum, u64>, 4> sums{
      {{kFree, free}, {kRecords, records}, {kWaiting, waiting}, {kUsed, used}}};
  for (const auto& [sum, value] : sums)
    if (get(sum) != value)
      return "sum " + std::to_string(sum) + " is " + std::to_string(get(sum)) + ", not " + std::to_string(value);
  const Sum firsts[] = {kQueue, kPending, kResting};
  bool hand = get(kHand) == kNone;
  for (u32 list = 0; list < 3; ++list) {
    u32 before = kNone, length = 0;
    u64 sequence = 0;
    for (u64 one = get(firsts[list]); one != kNone; one = see(entries_[one].next), ++length) {
      bool valid = false;
      if (one < granules && see(entries_[one].previous) == before) {
        const SlabContent content = load(static_cast<u32>(one), &valid);
        valid =
            valid && content.state == std::array{SlabState::kRecord, SlabState::kPending, SlabState::kResting}[list];
        if (list == 0) valid = valid && content.sequence >= sequence, sequence = content.sequence;
      }
      if (!valid || length > granules) return "list " + std::to_string(list) + " is broken";
      if (list == 0 && one == get(kHand)) hand = true;
      before = static_cast<u32>(one);
    }
    if (length != lists[list] || get(static_cast<Sum>(firsts[list] + 1)) != before)
      return "list " + std::to_string(list) + " is not complete";
  }
  if (!hand) return "the hand is at no record";
  u64 keys = 0, owners = 0, of_owners = 0;
  for (u32 slot = 0; slot < slots_; ++slot) {
    keys += see(keys_[slot]) != 0;
    if (const u32 value = see(owners_[slot])) {
      const u32 first = (value & ((1u << kTagShift) - 1)) - 1;
      bool valid = false;
      SlabContent content;
      if (first < granules) content = load(first, &valid);
      if (!valid || owner_first(content.owner) != first) return "an owner that is not found";
      u64 bytes = 0;
      u32 before = kNone;
      for (u32 one = first; one != kNone; before = one, one = see(entries_[one].owner_next)) {
        const SlabContent other = need(one);
        if (other.owner != content.owner || see(entries_[one].owner_previous) != before)
          return "an owner's list is broken";
        bytes += other.payload_bytes;
      }
      if (before != see(entries_[first].owner_last) || bytes != see(entries_[first].owner_bytes))
        return "an owner's sums are wrong";
      ++owners, of_owners += bytes;
    }
  }
  if (keys != records) return "the hash table has " + std::to_string(keys) + " records of " + std::to_string(records);
  if (owners != get(kOwners) || of_owners != owned) return "owners are not complete";
  return "";
}

}  // namespace lmc
