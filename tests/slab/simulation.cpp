// Many clients of one slab's index, in one process: a seeded scheduler lets one of them run up to its next store to
// shared memory, and stops, resumes or kills clients there. The same seed repeats a run. STEPS: turns per run.
//
//   slab_simulation kills SEED RUNS STEPS     clients are stopped and killed; nothing may be lost, wrong or found twice
//   slab_simulation cuts SEED RUNS STEPS      also cuts power: the disk has each sector as it was at some moment since
//                                             the last flush; what was flushed is there
//   slab_simulation damage SEED RUNS STEPS    also changes bytes of the file: no crash, no wrong payload, it works
//   slab_simulation points stop|kill    one client is stopped or killed at each store of each kind of change in turn
//   slab_simulation process TABLE LOCK GRANULES SIGNAL N    a real process that sends itself SIGNAL at its store N
//   slab_simulation rebuild GRANULES    times a rebuild; forgets NUMBER: forgets that many owners
#undef _FORTIFY_SOURCE  // it treats a jump to another stack as an error
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include "slab_index.h"

using namespace lmc;

namespace {

struct Killed {};

struct Client;
Client* running = nullptr;                    // the client whose coroutine runs
std::function<void()> at_each_store = [] {};  // for runs without coroutines
u64 seed_of_run = 0;
std::array<u64, 8> totals{};

[[noreturn]] void fail(const std::string& what) {
  std::printf("\nseed %llu: %s\n", static_cast<unsigned long long>(seed_of_run), what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

struct World {
  static constexpr u32 kMark = 80;  // the offset of the header's mark for a change under way
  static constexpr u64 kNowhere = u64{1} << 30;
  static constexpr u32 kGranules = 24, kGranuleBytes = 64, kSegment = 8, kKeys = 20, kOwners = 3;
  static constexpr u64 kSector = 512;  // disks write it atomically

  World(u32 granules, u32 segment, u64 seed) : random(seed) {
    shape = {granules, kGranuleBytes, segment};
    bytes = SlabIndex::file_bytes(shape);
    // No access is allowed in the GiB before the file and the GiB after it.
    const u64 pages = (bytes + 4095) / 4096 * 4096;
    room = kNowhere + pages + kNowhere;
    mapped = static_cast<u8*>(mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapped == MAP_FAILED || mprotect(mapped + kNowhere, pages, PROT_READ | PROT_WRITE) != 0) fail("no memory");
    file = mapped + kNowhere + pages - bytes;
    payload.resize(granules);
    disk.resize(bytes);
    disk_payload.resize(granules);
    rows.fill(nullptr);
  }
  ~World() { munmap(mapped, room); }

  u64 draw(u64 below) { return random() % below; }

  // Writes a sector from memory to the disk, or back.
  void write_sector(u64 at, bool back = false) {
    const u64 begin = at * kSector, length = std::min(kSector, bytes - begin);
    std::memcpy(back ? file + begin : disk.data() + begin, back ? disk.data() + begin : file + begin, length);
  }
  // Whether a record must have the payload that was put.
  bool is_whole(u64 content) const { return !damaged && (content & 0xFFFFFFFF) > torn; }
  bool has_payload(const SlabFound& record) const {
    bool good = true;
    for (u64 granule = 0; granule * kGranuleBytes < record.payload_bytes; ++granule)
      good = good && payload[record.start + granule] == static_cast<u64>(record.checksum);
    return good;
  }
  u64 sectors() const { return (bytes + kSector - 1) / kSector; }

  std::mt19937_64 random;
  SlabIndex::Shape shape;
  u8 *mapped, *file;
  u64 room, bytes;
  double now = 1000, wall = 1e9;  // seconds since the machine's start; wall-clock time at its start
  std::array<u64, 2> boot{1, 2};
  bool damaged = false, cuts_power = false;
  std::vector<u8> disk;                                           // the file after a power cut
  std::vector<u64> payload, disk_payload;                         // by granule: the content that was written there
  std::map<u64, u64> as_of;                                       // by content
  std::map<u64, u64> owner_of;                                    // by content
  u64 contents = 0, torn = 0;                                     // contents up to `torn` existed before a power cut
  std::set<u64> flushed;                                          // contents
  std::array<u64, kOwners + 1> forgotten{}, forgotten_on_disk{};  // the moment before the last `forget` that returned
  Client* writer = nullptr;
  std::array<Client*, kSlabRows> rows;
  u64 hits = 0, busy = 0, puts = 0, kills = 0, stops = 0, cuts = 0, kept = 0;
};

struct SimulatedLock final : SlabLock {
  SimulatedLock(World& world, Client* client) : world(world), client(client) {}
  bool try_lock() override {
    if (world.writer) return false;
    world.writer = client;
    return true;
  }
  void unlock() override {
    if (world.writer == client) world.writer = nullptr;
  }
  i64 holder() override { return world.writer ? 1 : -1; }
  u64 alive() override {
    u64 alive = 0;
    for (u32 row = 0; row < kSlabRows; ++row)
      if (world.rows[row] && world.rows[row] != client) alive |= u64{1} << row;
    return alive;
  }
  void wait(double seconds) override;
  double seconds() override { return world.now; }
  u64 random() override { return world.random(); }

  World& world;
  Client* client;
};

// The lock of an observer, which reads between two steps of the clients.
struct ObservingLock final : SlabLock {
  explicit ObservingLock(World& world) : world(world) {}
  bool try_lock() override { return !world.writer; }
  void unlock() override {}
  i64 holder() override { return -1; }
  u64 alive() override { return ~u64{0}; }
  void wait(double) override {}
  double seconds() override { return world.now; }
  World& world;
};

SlabKey key_of(u64 id) {
  SlabKey key;
  key.bytes = 36;
  key.words[0] = id;
  return key;
}

SlabOwner owner_of(u64 id) { return id ? SlabOwner{id, id} : SlabOwner{}; }

u64 bytes_of(u64 key) { return 1 + key * 37 % (World::kGranuleBytes * 5); }

// One process: a coroutine that works on the store until it dies.
struct Client {
  Client(World& world, u32 row) : world(world), row(row), lock(world, this) {
    world.rows[row] = this;
    index = std::make_unique<SlabIndex>(world.file, world.shape, lock, row);
    stack.reset(new u8[kStack]);
  }

  // Uses jumps, because they need no system calls.
  void resume() {
    running = this;
    if (!_setjmp(scheduler)) {
      if (begun) _longjmp(here, 1);
      begun = true;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = stack.get();
      context.uc_stack.ss_size = kStack;
      makecontext(&context, &Client::enter, 0);
      setcontext(&context);
    }
    running = nullptr;
  }

  // Yields to the scheduler; throws Killed if the client was killed meanwhile.
  void pause() {
    if (!_setjmp(here)) _longjmp(scheduler, 1);
    if (killed) throw Killed{};
  }

  // Gives the client new work. Its old work must be done.
  void begin(std::function<void()> what) {
    work = std::move(what);
    begun = done = false;
  }

  void die() {
    killed = true;
    if (!done) resume();
    if (world.writer == this) world.writer = nullptr;
    for (Client*& owner : world.rows)
      if (owner == this) owner = nullptr;
  }

  static void enter() {
    Client* self = running;
    try {
      self->run();
    } catch (const Killed&) {
    } catch (const std::exception& error) {
      fail(std::string("raised: ") + error.what());
    }
    self->done = true;
    _longjmp(self->scheduler, 1);
  }

  SlabTerms terms() const { return {world.now, world.wall + world.now, 0.2, ttl, quota}; }

  // Whether the change was made. It must not take longer than its patience.
  template <class Change>
  bool tries(Change change) {
    const double begun = world.now;
    const bool alone = others_may_stop;
    try {
      change();
      return true;
    } catch (const SlabBusy&) {
      ++world.busy;
      if (alone && world.now - begun > 60) fail("a change waited for too long");
      return false;
    } catch (const SlabBroken&) {
      if (!world.damaged) fail("the index is broken without damage");
      return false;
    }
  }

  void run() {
    if (work) {
      work();
      return;
    }
    while (!tries([&] { index->open(world.boot, true, terms()); })) pause();
    while (true) {
      step();
      pause();
    }
  }

  void step() {
    const u64 id = world.draw(World::kKeys), what = world.draw(100);
    if (what < 30) {
      put({id, world.draw(World::kKeys)}, world.draw(World::kOwners + 1));
    } else if (what < 68) {
      read(id, what < 40);
    } else if (what < 80) {
      tries([&] { index->remove({key_of(id)}, terms()); });
    } else if (what < 84) {
      forget(1 + world.draw(World::kOwners));
    } else if (what < 85) {
      tries([&] { index->clear(terms()); });
    } else if (what < 92) {
      bury();
    } else if (what < 95 && world.cuts_power) {
      flush();
    } else if (!pins.empty()) {
      for (const u32 start : pins) index->table().unpin(start);
      pins.clear();
    }
  }

  // Sometimes lets others run far ahead.
  void dwell() {
    for (u64 more = world.draw(3) ? 1 : world.draw(400); more > 0; --more) pause();
  }

  void put(std::vector<u64> ids, u64 owner) {
    std::vector<SlabKey> keys;
    std::vector<u64> sizes;
    for (const u64 id : ids) keys.push_back(key_of(id)), sizes.push_back(bytes_of(id));
    SlabIndex::Reserved reserved;
    const std::vector<SlabPlace> back = std::exchange(unreturned, {});
    if (!tries([&] { reserved = index->reserve(keys, sizes, owner_of(owner), back, terms()); })) {
      unreturned = back;
      return;
    }
    std::vector<SlabPut> puts;
    std::vector<SlabPlace> places;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (!reserved.places[i]) continue;
      const SlabPlace place = *reserved.places[i];
      const u64 content = ids[i] << 32 | ++world.contents;
      world.as_of[content] = reserved.moment;
      world.owner_of[content] = owner;
      for (u64 granule = 0; granule * World::kGranuleBytes < sizes[i]; ++granule) {
        pause();
        world.payload[place.start + granule] = content;
      }
      places.push_back(place);
      puts.push_back({keys[i], place, static_cast<i64>(content), reserved.moment, 0});
    }
    dwell();
    bool given = true;
    if (world.draw(8) == 0)
      given = tries([&] { index->abandon(places, terms()); });
    else
      given = tries([&] { world.puts += index->publish(puts, terms()); });
    if (!given) unreturned = places;
  }

  void read(u64 id, bool hold) {
    const auto found = index->find(key_of(id), world.now, ttl);
    if (!found) return;
    const u64 whose = world.owner_of[static_cast<u64>(found->checksum)];
    if (whose && !world.damaged && world.as_of[static_cast<u64>(found->checksum)] <= world.forgotten[whose])
      fail("a record of an owner who was forgotten");
    dwell();
    if (!index->table().pin(found->start, found->generation)) return;
    const u64 content = static_cast<u64>(found->checksum);
    const bool wrong_size = found->payload_bytes != bytes_of(id);
    bool good = !wrong_size;
    for (u64 granule = 0; good && granule * World::kGranuleBytes < found->payload_bytes; ++granule) {
      dwell();
      good = world.payload[found->start + granule] == content;  // the checksum
    }
    if (!good && world.is_whole(content)) fail("a record that does not have its payload");
    if (good && content >> 32 != id) fail("the payload of another key");
    if (good && !world.damaged) {
      const u64 owner = world.owner_of[content];
      if (found->owner != owner_of(owner)) fail("a record of another owner");
    }
    ++world.hits;
    if (good) index->table().touch(found->start, found->generation);
    if (hold && pins.size() < 3)
      pins.push_back(found->start);
    else
      index->table().unpin(found->start);
    if (!good) tries([&] { index->discard(key_of(id), {found->start, found->generation}, terms()); });
  }

  void forget(u64 owner) {
    const u64 moment = index->moment();
    if (!tries([&] { index->forget(owner_of(owner), terms()); })) return;
    world.forgotten[owner] = std::max(world.forgotten[owner], moment);
    if (!world.cuts_power) return;
    flush();
    world.forgotten_on_disk[owner] = std::max(world.forgotten_on_disk[owner], moment);
  }

  // Like FileStore: writes payloads, then the index, while others continue.
  void flush() {
    std::set<u64> there;
    for (u64 id = 0; id < World::kKeys; ++id)
      if (const auto found = index->find(key_of(id), world.now, 0))
        if (world.has_payload(*found)) there.insert(static_cast<u64>(found->checksum));
    for (u32 granule = 0; granule < World::kGranules; ++granule) {
      if (world.draw(8) == 0) pause();
      world.disk_payload[granule] = world.payload[granule];
    }
    for (u64 sector = 0; sector < world.sectors(); ++sector) {
      if (world.draw(8) == 0) pause();
      world.write_sector(sector);
    }
    world.flushed.insert(there.begin(), there.end());
  }

  void bury() {
    u64 dead = 0;
    for (u32 row = 0; row < kSlabRows; ++row)
      if (index->rows_taken() >> row & 1 && !world.rows[row]) {
        dead |= u64{1} << row;
        world.rows[row] = this;
      }
    if (!dead) return;
    tries([&] { index->bury(dead, terms()); });
    for (u32 row = 0; row < kSlabRows; ++row)
      if (dead >> row & 1) world.rows[row] = nullptr;
  }

  World& world;
  u32 row;
  SimulatedLock lock;
  std::unique_ptr<SlabIndex> index;
  static constexpr u64 kStack = 256 << 10;
  std::function<void()> work;
  std::unique_ptr<u8[]> stack;
  jmp_buf here, scheduler;
  bool begun = false, killed = false, done = false, stopped = false, others_may_stop = true;
  double ttl = 0;
  u64 quota = 0;
  std::vector<u32> pins;
  std::vector<SlabPlace> unreturned;
};

void SimulatedLock::wait(double seconds) {
  world.now += seconds;
  if (running) client->pause();
}

// Checks that no record's owner was forgotten after it was reserved, and that each record has its own payload.
void check_records(World& world, SlabIndex& index) {
  for (u64 id = 0; id < World::kKeys; ++id) {
    const auto found = index.find(key_of(id), world.now, 0);
    if (!found) continue;
    const u64 content = static_cast<u64>(found->checksum), owner = world.owner_of[content];
    if (owner && world.as_of[content] <= world.forgotten[owner]) fail("a record of an owner who was forgotten");
    if (found->payload_bytes != bytes_of(id)) fail("a record of another length");
    if (world.is_whole(content) && !world.has_payload(*found))
      fail("a record that does not have its payload at the end");
  }
}

void damage(World& world) {
  world.damaged = true;
  const u64 at = world.draw(world.bytes), length = std::min(world.bytes - at, 1 + world.draw(400));
  switch (world.draw(5)) {
    case 0:
      world.file[at] ^= 1 << world.draw(8);
      break;
    case 1:
      for (u64 i = 0; i < length; ++i) world.file[at + i] = static_cast<u8>(world.draw(256));
      break;
    case 2:
      std::memset(world.file + at, world.draw(2) ? 0 : 255, length);
      break;
    case 3: {  // swap entries or pages
      const u64 other = world.draw(world.bytes - length + 1);
      std::vector<u8> copy(world.file + at, world.file + at + length);
      std::memmove(world.file + at, world.file + other, length);
      std::memcpy(world.file + other, copy.data(), copy.size());
      break;
    }
    default:
      for (u64 i = 0; i < 256; ++i) world.file[world.draw(2) ? i : i + kHeaderBytes] = static_cast<u8>(world.draw(256));
  }
}

// Only the disk's contents remain: each sector as it was when it was last written, at some moment since the last flush.
// All clients are dead. The machine starts again, and some clients die while they open the store.
void cut_power(World& world, const std::map<u64, u64>& expected) {
  const u64 share = world.draw(3);  // how much of memory reaches the disk: none, half or all
  for (u64 sector = 0; sector < world.sectors(); ++sector) {
    if (world.draw(2) < share) world.write_sector(sector);
    world.write_sector(sector, true);
  }
  for (u32 granule = 0; granule < World::kGranules; ++granule)
    if (world.draw(2) >= share) world.payload[granule] = world.disk_payload[granule];
  world.disk_payload = world.payload;
  world.wall += world.now - (world.draw(4) ? 0 : 1e5);  // sometimes the wall clock is set back
  world.now = 10;
  ++world.boot[0], ++world.cuts;
  world.torn = world.contents;
  for (auto& [content, as_of] : world.as_of) as_of = as_of > world.forgotten_on_disk[world.owner_of[content]];
  world.forgotten = world.forgotten_on_disk = {};
  for (u64 more = world.draw(3); more > 0; --more) {
    Client opener(world, 0);
    opener.begin([&] { opener.index->open(world.boot, true, opener.terms()); });
    for (u64 turns = 1 + world.draw(world.draw(2) ? 30 : 2000); turns > 0 && !opener.done; --turns) opener.resume();
    opener.die();
  }
  Client first(world, 0);
  first.index->open(world.boot, true, first.terms());
  const std::string wrong = first.index->check(first.terms());
  if (!wrong.empty()) fail("after a power cut: " + wrong);
  check_records(world, *first.index);
  for (const auto& [id, content] : expected) {
    const auto found = first.index->find(key_of(id), world.now, 0);
    if (!found || static_cast<u64>(found->checksum) != content || !world.has_payload(*found))
      fail("a record that was flushed is lost");
  }
  world.flushed.clear();
  for (const auto& [id, content] : expected) world.flushed.insert(content);
  world.kept += expected.size();
  first.done = true;
  first.die();
}

enum class Mode { kKills, kCuts, kDamage };

void run_once(u64 seed, Mode mode, u64 steps) {
  seed_of_run = seed;
  const bool with_damage = mode == Mode::kDamage;
  World world(World::kGranules, World::kSegment, seed);
  world.cuts_power = mode == Mode::kCuts;
  std::vector<std::unique_ptr<Client>> clients, dead;
  const u64 most = 2 + world.draw(4), ttl = world.draw(3) ? 0 : 20, quota = world.draw(2) ? 0 : 600;
  const u64 rare = std::max<u64>(400, steps / 5);
  const auto start = [&] {
    u32 row = 0;
    while (world.rows[row]) ++row;
    clients.push_back(std::make_unique<Client>(world, row));
    clients.back()->ttl = static_cast<double>(ttl);
    clients.back()->quota = quota;
  };
  const auto kill = [&](u64 which) {
    clients[which]->die();
    ++world.kills;
    dead.push_back(std::move(clients[which]));
    clients.erase(clients.begin() + static_cast<i64>(which));
  };
  ObservingLock observing(world);
  // A row without a client: it has no pins.
  auto observer = std::make_unique<SlabIndex>(world.file, world.shape, observing, 62);
  for (u64 step = 0; step < steps; ++step) {
    if (clients.size() < most && world.draw(10) == 0) start();
    if (clients.empty()) continue;
    const u64 which = world.draw(clients.size()), chance = world.draw(rare);
    if (chance < 4) {
      kill(which);
    } else if (chance < 8 || (clients[which]->stopped && chance < 100)) {
      world.stops += clients[which]->stopped = !clients[which]->stopped;
    } else if (chance < 16 && with_damage) {
      damage(world);
    } else if (chance < 10 && world.cuts_power) {
      std::map<u64, u64> expected;
      for (u64 id = 0; id < World::kKeys; ++id)
        if (const auto found = observer->find(key_of(id), world.now, 0)) {
          const bool stays = observer->table().generation(found->start) == found->generation;  // else its end has begun
          const u64 content = static_cast<u64>(found->checksum);
          if (stays && world.flushed.count(content)) expected[id] = content;
        }
      while (!clients.empty()) kill(0);
      cut_power(world, expected);
      observer = std::make_unique<SlabIndex>(world.file, world.shape, observing, 62);
    } else if (!clients[which]->stopped) {
      for (u64 more = 1ull << world.draw(7); more > 0; --more) clients[which]->resume();
    }
    if (world.cuts_power) {  // the system may write anything at any time
      world.write_sector(world.draw(world.draw(4) ? 20 : world.sectors()));
      const u64 granule = world.draw(World::kGranules);
      world.disk_payload[granule] = world.payload[granule];
    }
    world.now += static_cast<double>(world.draw(100)) * 1e-5;
    if (step % 50 == 0 && !world.writer && !with_damage && observer->rows_taken()) {
      const std::string wrong = observer->check({});
      if (!wrong.empty() && wrong != "a change was not finished") fail("meanwhile: " + wrong);
    }
  }
  while (!clients.empty()) kill(0);
  // The next client must find everything in order.
  Client last(world, 63);
  SlabTerms terms{world.now += 1, world.wall + world.now, 1, 0, 0};
  last.index->open(world.boot, true, terms);
  if (with_damage) {
    last.index->bury(~(u64{1} << 63), terms);
    terms.now = world.now += kRestSeconds + 1;
    for (u64 i = 0; i < 300; ++i) {  // accesses repair what they touch
      const u64 id = world.draw(World::kKeys);
      last.index->remove({key_of(id)}, terms);
      const auto reserved = last.index->reserve({key_of(id)}, {1}, {}, {}, terms);
      if (reserved.places[0]) last.index->publish({{key_of(id), *reserved.places[0], 7, reserved.moment, 0}}, terms);
      const auto found = last.index->find(key_of(id), world.now, 0);
      if (reserved.places[0] && (!found || found->checksum != 7)) fail("a put that is not found after damage");
      if (i > 250 && !reserved.places[0]) fail("no room after damage");
    }
    world.file[World::kMark] |= 1;  // the mark: the whole index is rebuilt
  }
  last.index->remove({}, terms);
  const std::string wrong = last.index->check(terms);
  if (!wrong.empty()) fail("at the end: " + wrong);
  if (!with_damage) check_records(world, *last.index);
  // Burying dead clients releases everything that they hold, and all space is free again.
  last.index->bury(last.index->rows_taken() & ~(u64{1} << 63), terms);
  SlabTerms later = terms;
  // After a power cut, the store's clock continues from its last value on disk.
  later.now = world.now += kRestSeconds + (world.cuts ? 100 : 1);
  last.index->clear(later);
  for (const auto& [name, value] : last.index->sizes()) {
    const std::string size = name;
    if (size == "free_bytes" && value != u64{World::kGranules} * World::kGranuleBytes) fail("room was lost");
    if ((size == "records" || size == "pending" || size == "owners" || size == "used_bytes") && value)
      fail("something was left: " + size);
  }
  if (!last.index->check(later).empty()) fail("after all was removed: " + last.index->check(later));
  const u64 counts[]{1, world.hits, world.puts, world.kills, world.stops, world.busy, world.cuts, world.kept};
  for (std::size_t i = 0; i < totals.size(); ++i) totals[i] += counts[i];
}

// Halts a client at each store of each kind of change in turn, in a store that has one of everything.
void points(bool kills) {
  using Change = std::function<void(Client&)>;
  const u64 seven = bytes_of(7);
  const std::vector<Change> changes{
      [](Client& c) { c.put({7, 8}, 1); },
      [](Client& c) { c.index->remove({key_of(1), key_of(2)}, c.terms()); },
      [](Client& c) { c.index->forget(owner_of(1), c.terms()); },
      [](Client& c) { c.index->clear(c.terms()); },
      [](Client& c) { c.put({9, 10, 11, 12, 13, 14}, 2); },  // evicts
      [](Client& c) { c.index->bury(u64{1} << 9, c.terms()); },
      [](Client& c) {
        c.world.file[World::kMark] |= 1;
        c.index->remove({}, c.terms());
      },
      [](Client& c) { c.index->open(c.world.boot, true, c.terms()); },
  };
  u64 halts = 0;
  for (std::size_t kind = 0; kind < changes.size(); ++kind) {
    for (u64 point = 0;; ++point) {
      World world(World::kGranules, World::kSegment, 1);
      Client other(world, 0), victim(world, 1), before(world, 9);
      for (Client* client : {&other, &before}) client->index->open(world.boot, true, client->terms());
      if (kind + 1 != changes.size()) victim.index->open(world.boot, true, victim.terms());
      const auto fill = [&](Client& client, u64 id, u64 owner) {
        client.begin([&, id, owner] { client.put({id}, owner); });
        while (!client.done) client.resume();
      };
      for (u64 id = 1; id < 6; ++id) fill(other, id, id % 3);
      const auto pinned = other.index->find(key_of(2), world.now, 0);
      if (!pinned || !other.index->table().pin(pinned->start, pinned->generation)) fail("a record that is not there");
      before.index->reserve({key_of(19)}, {seven}, owner_of(2), {}, before.terms());
      for (u64 i = 0; i < 9; ++i) other.index->forget(owner_of(99), other.terms());  // no entry has these moments
      const u64 moment = other.index->moment();
      victim.begin([&] { changes[kind](victim); });
      for (u64 i = 0; i <= point && !victim.done; ++i) victim.resume();
      if (victim.done) break;
      ++halts;
      if (kills) {
        world.rows[9] = nullptr;
        victim.die();
      } else {  // others continue
        world.rows[9] = nullptr;
        const bool locked = world.writer == &victim;
        for (u64 i = 0; i < 3; ++i) {
          const double begun = world.now;
          const bool changed = other.tries([&] { other.index->remove({key_of(3)}, other.terms()); });
          if (changed == locked) fail("a change that should not have been made, or should have been");
          if (world.now - begun > 0.21) fail("a wait that was too long");
          const auto found = other.index->find(key_of(5), world.now, 0);
          if (found && found->payload_bytes != bytes_of(5)) fail("a wrong record beside a stopped change");
        }
        while (!victim.done) victim.resume();
      }
      other.index->remove({}, other.terms());
      if (other.index->moment() < moment) fail("the sequence has gone back");
      for (u64 id = 0; id < World::kKeys; ++id) fill(other, id, 3);  // use all space
      if (!world.has_payload(*pinned)) fail("what was pinned is overwritten");
      other.index->remove({key_of(4)}, other.terms());
      const std::string wrong = other.index->check(other.terms());
      if (!wrong.empty()) fail("change " + std::to_string(kind) + ", store " + std::to_string(point) + ": " + wrong);
      check_records(world, *other.index);
    }
  }
  std::printf("%llu halts", static_cast<unsigned long long>(halts));
}

int process(const char* table, const char* lock_path, u32 granules, int signal_number, u64 n) {
  const SlabIndex::Shape shape{granules, 16 << 10, (1 << 30) / (16 << 10)};
  const u64 bytes = SlabIndex::file_bytes(shape);
  const int fd = ::open(table, O_RDWR), lock_fd = ::open(lock_path, O_RDWR);
  void* file = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (fd < 0 || lock_fd < 0 || file == MAP_FAILED) fail("no such store");
  SlabFileLock row(lock_fd, 50);
  if (!row.try_lock()) fail("the row is taken");
  SlabFileLock lock(lock_fd, 66);
  SlabIndex index(file, shape, lock, 50);
  const auto fixed = SlabIndex::fixed_of(file);
  if (!fixed) fail("no header");
  timespec boot;
  clock_gettime(CLOCK_BOOTTIME, &boot);
  const SlabTerms terms{static_cast<double>(boot.tv_sec), static_cast<double>(std::time(nullptr)), 1, 0, 0};
  index.open(fixed->boot_id, true, terms);
  u64 stores = 0;
  at_each_store = [&] {
    if (++stores == n) ::raise(signal_number);
  };
  const auto reserved = index.reserve({key_of(1000)}, {100'000}, owner_of(5), {}, terms);
  if (reserved.places[0]) index.publish({{key_of(1000), *reserved.places[0], 7, reserved.moment, 0}}, terms);
  index.remove({key_of(1000)}, terms);
  std::printf("%llu stores\n", static_cast<unsigned long long>(stores));
  return 0;
}

void time_rebuild(u32 granules) {
  World world(granules, 65536, 1);
  Client client(world, 0);
  client.index->open(world.boot, true, client.terms());
  std::vector<SlabKey> keys;
  std::vector<u64> sizes;
  for (u64 i = 0; i < granules; ++i) keys.push_back(key_of(i)), sizes.push_back(1);
  const auto reserved = client.index->reserve(keys, sizes, {}, {}, client.terms());
  std::vector<SlabPut> puts;
  for (u64 i = 0; i < granules; ++i) puts.push_back({keys[i], *reserved.places[i], 0, reserved.moment, 0});
  client.index->publish(puts, client.terms());
  world.file[World::kMark] |= 1;
  const std::clock_t begin = std::clock();
  client.index->remove({}, client.terms());
  const double took = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  std::printf("%u records in %u granules: %.1f ms, %.1f bytes per granule\n", granules, granules, took * 1e3,
              static_cast<double>(world.bytes) / granules);
}

void forgets(u64 number) {
  World world(World::kGranules, World::kSegment, 1);
  Client client(world, 0);
  client.index->open(world.boot, true, client.terms());
  const u64 old = client.index->moment();
  std::vector<std::optional<SlabPlace>> places;
  const auto reserve = [&](u64 id, u64 owner) {
    return *client.index->reserve({key_of(id)}, {1}, {owner, 1}, {}, client.terms()).places[0];
  };
  const SlabPlace early = reserve(1, number + 5);
  for (u64 i = 1; i <= number; ++i) client.index->forget({i, 1}, client.terms());
  const u64 now = client.index->moment();
  const SlabPlace late = reserve(2, number + 5), gone = reserve(3, number - 3);
  u64 published = client.index->publish({{key_of(1), early, 0, old, 0}}, client.terms());
  if (published) fail("a put from before the oldest owner that is remembered");
  if (client.index->publish({{key_of(2), late, 0, now, 0}}, client.terms()) != 1) fail("a put that was dropped");
  if (client.index->publish({{key_of(3), gone, 0, now - 10, 0}}, client.terms())) fail("an owner that was forgotten");
  if (!client.index->check(client.terms()).empty()) fail(client.index->check(client.terms()));
  std::printf("%llu forgets\n", static_cast<unsigned long long>(number));
}

}  // namespace

void lmc::slab_hook() {
  at_each_store();
  if (running) running->pause();
}

int main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  const auto number = [&](int i) { return i < argc ? std::strtoull(argv[i], nullptr, 10) : 0; };
  if (mode == "kills" || mode == "cuts" || mode == "damage") {
    for (u64 seed = number(2); seed < number(2) + number(3); ++seed) {
      if (seed % 1000 == 0) std::printf("from seed %llu on\n", static_cast<unsigned long long>(seed));
      std::fflush(stdout);
      run_once(seed, mode == "kills" ? Mode::kKills : mode == "cuts" ? Mode::kCuts : Mode::kDamage, number(4));
    }
    const char* names[]{"schedules", "hits", "puts", "kills", "stops", "busy", "power cuts", "flushed and kept"};
    for (std::size_t i = 0; i < totals.size(); ++i)
      std::printf("%s%llu %s", i ? ", " : "", static_cast<unsigned long long>(totals[i]), names[i]);
  } else if (mode == "points") {
    points(std::string(argv[2]) == "kill");
  } else if (mode == "process") {
    return process(argv[2], argv[3], static_cast<u32>(number(4)), static_cast<int>(number(5)), number(6));
  } else if (mode == "rebuild") {
    time_rebuild(static_cast<u32>(number(2)));
  } else if (mode == "forgets") {
    forgets(number(2));
  } else {
    return 2;
  }
  std::printf("\n");
  return 0;
}
