// Passes tables of a call (planes, chunks, block ids; items, cuts) to a kernel: in its parameters, where a launch
// copies them and a CUDA graph keeps them, or, if those are too small, in memory that the operation's caller provides.
#pragma once

#include <cstring>
#include <vector>

#include "error.h"
#include "ops.h"

namespace lmc {

// A kernel's parameter: `Head`, and its tables. Every driver of CUDA 12 takes 4 KiB.
template <typename Head>
struct WithTable {
  Head head;
  const u8* elsewhere;  // the table, if it is not here
  alignas(16) u8 bytes[4096 - (sizeof(Head) + 8 + 15) / 16 * 16];

  // In a kernel, on a __grid_constant__ parameter.
  LMC_HOST_DEVICE const u8* table() const { return elsewhere ? elsewhere : bytes; }
};

// Turns the offset of a part of a table into its address.
template <typename T>
LMC_HOST_DEVICE const T* in_table(const u8* table, const T* offset) {
  return reinterpret_cast<const T*>(table + reinterpret_cast<std::uintptr_t>(offset));
}

// A table built on the host, part by part, each part aligned to 16 bytes.
class Table {
 public:
  // Appends `count` values; returns their offset, for in_table.
  template <typename T>
  const T* append(const T* values, u64 count) {
    const u64 offset = bytes_after(0);
    bytes_.resize(offset + count * sizeof(T));
    if (count) std::memcpy(bytes_.data() + offset, values, count * sizeof(T));
    return reinterpret_cast<const T*>(offset);
  }
  // The table's length after appending a part of that many bytes.
  u64 bytes_after(u64 part) const { return (bytes_.size() + 15) / 16 * 16 + part; }

  // Puts the table where a kernel with these parameters finds it, in the order of the launch's stream.
  template <typename Head>
  void put(const char* op, const cuda::Launch& where, WithTable<Head>& parameters) const {
    if (bytes_.size() <= sizeof parameters.bytes) {
      if (!bytes_.empty()) std::memcpy(parameters.bytes, bytes_.data(), bytes_.size());
      return;
    }
    if (is_captured(op, where.stream))
      throw std::runtime_error(std::string(op) + ": a CUDA graph cannot capture a call whose tables have " +
                               std::to_string(bytes_.size()) + " bytes; kernel parameters hold " +
                               std::to_string(sizeof parameters.bytes) +
                               ": pass ids on the device, or fewer ids, planes, items or cuts");
    parameters.elsewhere = where.place_table(bytes_.data(), bytes_.size());
  }

 private:
  std::vector<u8> bytes_;
};

}  // namespace lmc
