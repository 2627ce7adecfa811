// Cases of the operations in a file, for the drivers in this folder.
//
// CASES, little-endian: u32 number of cases, then for each case
//   text name, text op
//   u32 number of fields, each: text name, u64 bytes, the bytes; integers are u64s, lists of them are concatenated
//   u32 number of regions of memory, each: text name, u8 whether host memory, u64 misalignment of its first byte,
//     u64 bytes, the bytes before the call, the bytes expected after it
// where a text is a u32 length and that many bytes. Fields name regions by number. Per op, `?` optional:
//   apply_mm_hashes_to_token_ids: count, items; region 0: int64 ids
//   prefix_keys: count, wide, items, root, cuts; regions 0: ids, 1: keys
//   gather, scatter: token_mode, host_ids, max_blocks, planes (offsets in region 0, the cache),
//     layout (num_pages, page_stride, page_bytes, run_bytes, run_stride, page_tokens, token_bytes),
//     chunks (each: region of ids, wide, count, tokens, region of payload, offset), checksums? (region),
//     payloads: 0 in device memory, 1 in host memory, 2 none (CUDA only); partial_sums (CUDA only)
//   gather_coded, scatter_coded: the same, token_mode 0, and sums (region: kCodedSums per chunk; 0, 0, 1 for a chunk
//   that
//     does not fit); chunks' payloads are tiles. A region whose name begins with "garbage" may hold anything
//     afterwards.
//   blake3_keyed_hash, blake3_derive_key: key or context, data, hash; no CUDA
// A field `places_no_table` says that all tables fit into kernel parameters.
// A field `refused` says that the call of cuda:: must throw std::invalid_argument; `cpu_refused`, that of cpu::.
// items: for each item u64 offset, u64 length, text modality, text identifier.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "ops.h"

namespace lmc {

[[noreturn]] inline void die(const std::string& why) {
  std::fprintf(stderr, "driver: %s\n", why.c_str());
  std::exit(2);
}

struct Reader {
  const char* at;
  const char* end;

  const char* take(u64 bytes) {
    if (bytes > static_cast<u64>(end - at)) die("the cases file ends early");
    at += bytes;
    return at - bytes;
  }
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::string bytes(u64 count) {
    const char* first = take(count);
    return {first, first + count};
  }
  std::string text() { return bytes(number<u32>()); }
};

struct Region {
  std::string name;
  bool host;
  u64 misalignment;
  std::string before, after;
};

struct Case {
  std::string name, op;
  std::map<std::string, std::string> fields;
  std::vector<Region> regions;

  bool has(const char* field) const { return fields.count(field) != 0; }
  const std::string& field(const char* field) const {
    if (!has(field)) die(name + " has no field " + field);
    return fields.at(field);
  }
  std::vector<u64> numbers(const char* field) const {
    const std::string& bytes = this->field(field);
    std::vector<u64> out(bytes.size() / 8);
    if (!out.empty()) std::memcpy(out.data(), bytes.data(), 8 * out.size());
    return out;
  }
  u64 number(const char* field) const { return numbers(field).at(0); }
  std::vector<Item> items() const {
    const std::string& bytes = field("items");
    Reader reader{bytes.data(), bytes.data() + bytes.size()};
    std::vector<Item> out;
    while (reader.at != reader.end) {
      Item item;
      item.offset = reader.number<u64>();
      item.length = reader.number<u64>();
      item.modality = reader.text();
      item.identifier = reader.text();
      out.push_back(item);
    }
    return out;
  }
};

// The arguments of a gather or scatter. address(number): the address of a region.
struct CopyArguments {
  PagedCache cache;
  Mode mode;
  std::vector<Chunk> chunks;

  template <typename Address>
  CopyArguments(const Case& c, const Address& address) {
    const std::vector<u64> layout = c.numbers("layout"), numbers = c.numbers("chunks");
    cache = {{}, layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6]};
    for (const u64 offset : c.numbers("planes")) cache.planes.push_back(address(0) + offset);
    mode = c.number("token_mode") ? Mode::kToken : Mode::kPage;
    for (std::size_t i = 0; i + 5 < numbers.size(); i += 6)
      chunks.push_back({address(numbers[i]), numbers[i + 2], numbers[i + 3], address(numbers[i + 4]),
                        numbers[i + 1] != 0, numbers[i + 5]});
  }
};

inline bool is_garbage(const Region& region) { return region.name.rfind("garbage", 0) == 0; }

// Of a chunk that does not fit, only that is promised.
inline void forget_sums_of_garbage(u64* sums, std::size_t chunks) {
  for (u64* of_chunk = sums; of_chunk < sums + chunks * kCodedSums; of_chunk += kCodedSums)
    if (of_chunk[kCodedSums - 1]) of_chunk[0] = of_chunk[1] = 0, of_chunk[kCodedSums - 1] = 1;
}

inline std::vector<Case> read_cases(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) die(std::string("cannot read ") + path);
  std::stringstream content;
  content << file.rdbuf();
  const std::string bytes = content.str();
  Reader reader{bytes.data(), bytes.data() + bytes.size()};
  std::vector<Case> cases(reader.number<u32>());
  for (Case& c : cases) {
    c.name = reader.text();
    c.op = reader.text();
    for (u32 i = reader.number<u32>(); i > 0; --i) {
      const std::string name = reader.text();
      c.fields[name] = reader.bytes(reader.number<u64>());
    }
    c.regions.resize(reader.number<u32>());
    for (Region& region : c.regions) {
      region.name = reader.text();
      region.host = reader.number<u8>() != 0;
      region.misalignment = reader.number<u64>();
      const u64 size = reader.number<u64>();
      region.before = reader.bytes(size);
      region.after = reader.bytes(size);
    }
  }
  return cases;
}

}  // namespace lmc
