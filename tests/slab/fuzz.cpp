// libFuzzer changes the bytes of a slab's index. Whatever they are, nothing crashes or loops forever, no record is
// found under another key, and an index that is opened again works. `make fuzz` runs it.
#include <cstdio>
#include <cstring>

#include "slab_index.h"

using namespace lmc;

namespace {

constexpr SlabIndex::Shape kShape{24, 64, 8};
constexpr u64 kKeys = 12;

struct Alone final : SlabLock {
  bool try_lock() override { return true; }
  void unlock() override {}
  i64 holder() override { return -1; }
  u64 alive() override { return 0; }
  void wait(double) override {}
  double seconds() override { return 0; }
  u64 random() override { return 7; }
};

SlabKey key_of(u64 id) {
  SlabKey key;
  key.bytes = 36;
  key.words[0] = id;
  return key;
}

const std::array<u64, 2> kBoot{1, 2};

void put(SlabIndex& index, u64 id, const SlabTerms& terms) {
  const auto reserved = index.reserve({key_of(id)}, {1 + id * 37 % 300}, {id % 3, id % 3}, {}, terms);
  if (reserved.places[0])
    index.publish({{key_of(id), *reserved.places[0], static_cast<i64>(id), reserved.moment, 0}}, terms);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

}  // namespace

// Each four bytes: the action, the place in the file, and the byte. The forgotten owners, the largest part of the file,
// come last and count as one place among many.
extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  Alone lock;
  std::vector<u8> file(SlabIndex::file_bytes(kShape));
  SlabTerms terms{1000, 1e9, 0, 0, 0};
  SlabIndex index(file.data(), kShape, lock, 0);
  index.open(kBoot, true, terms);
  for (u64 id = 0; id < kKeys; ++id) put(index, id, terms);
  try {
    for (; size >= 4; data += 4, size -= 4) {
      const u64 id = data[3] % kKeys;
      file[(data[1] | data[2] << 8) % (12 << 10)] = data[3];
      terms.now += 1;
      if (const auto found = index.find(key_of(id), terms.now, 0))
        if (found->key.words[0] != id || found->start + found->granules > kShape.granules) fail("another record");
      switch (data[0] % 8) {
        case 0:
          put(index, id, terms);
          break;
        case 1:
          index.remove({key_of(id)}, terms);
          break;
        case 2:
          index.forget({id % 3 + 1, id % 3 + 1}, terms);
          break;
        case 3:
          index.bury(~u64{1}, terms);
          break;
        case 4:
          if (const auto found = index.find(key_of(id), terms.now, 0))
            if (index.table().pin(found->start, found->generation)) index.table().unpin(found->start);
          break;
        case 5:
          SlabIndex(file.data(), kShape, lock, 1 + data[3] % 63).open(kBoot, data[3] & 1, terms);
          break;
        default:
          break;
      }
    }
  } catch (const SlabBroken&) {
  }
  SlabIndex last(file.data(), kShape, lock, 63);
  try {
    last.open({3, 4}, true, terms);
    last.clear(terms);
  } catch (const SlabBroken&) {
    fail("it cannot be opened");
  }
  put(last, 1, terms);
  if (!last.find(key_of(1), terms.now, 0)) fail("it does not work when it is opened anew");
  if (const std::string wrong = last.check(terms); !wrong.empty()) fail(wrong.c_str());
  return 0;
}
