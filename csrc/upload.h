// Small tables (block ids, items, cuts) from host to device memory without a wait: through pinned buffers, each guarded
// by an event that tells when the copy out of it is done.
#pragma once

#include <cstring>
#include <mutex>
#include <vector>

#include "error.h"
#include "launch.h"

namespace lmc {

// A table put together on the host, part by part, each part aligned to 16 bytes.
class UploadTable {
 public:
  // Appends `count` values; returns the part's offset in the table.
  template <typename T>
  u64 append(const T* values, u64 count) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    const u64 offset = bytes_.size();
    bytes_.resize(offset + count * sizeof(T));
    if (count) std::memcpy(bytes_.data() + offset, values, count * sizeof(T));
    return offset;
  }
  const u8* data() const { return bytes_.data(); }
  u64 bytes() const { return bytes_.size(); }

 private:
  std::vector<u8> bytes_;
};

class PinnedBuffers {
 public:
  static PinnedBuffers& instance() {
    // Never destroyed: at exit the CUDA runtime may be gone before it.
    static PinnedBuffers* buffers = new PinnedBuffers;
    return *buffers;
  }

  // Enqueues the copy of `table` to device memory `to` on `stream` of the current device `device`. Waits only when
  // kBuffers copies of this device are still under way.
  void upload(const char* op, const UploadTable& table, void* to, int device, cudaStream_t stream) {
    if (table.bytes() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    Buffer& buffer = acquire(op, table.bytes(), device);
    std::memcpy(buffer.host, table.data(), table.bytes());
    LMC_CUDA_CHECK(op, cudaMemcpyAsync(to, buffer.host, table.bytes(), cudaMemcpyHostToDevice, stream));
    LMC_CUDA_CHECK(op, cudaEventRecord(buffer.copied, stream));
  }

 private:
  static constexpr u64 kLeastBytes = 64 << 10;
  static constexpr std::size_t kBuffers = 32;

  struct Buffer {
    int device;
    u64 capacity;
    u8* host;
    cudaEvent_t copied;
  };

  Buffer& acquire(const char* op, u64 bytes, int device) {
    std::size_t under_way = 0;  // of those that are large enough
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      Buffer& buffer = buffers_[(next_ + i) % buffers_.size()];
      if (buffer.device != device) continue;
      if (buffer.capacity < bytes) continue;
      const cudaError_t state = cudaEventQuery(buffer.copied);
      if (state == cudaErrorNotReady) {
        cudaGetLastError();
        ++under_way;
        if (under_way < kBuffers) continue;
        LMC_CUDA_CHECK(op, cudaEventSynchronize(buffer.copied));
      } else {
        LMC_CUDA_CHECK(op, state);
      }
      next_ = (next_ + i + 1) % buffers_.size();
      return buffer;
    }
    Buffer buffer{device, kLeastBytes, nullptr, nullptr};
    while (buffer.capacity < bytes) buffer.capacity *= 2;
    LMC_CUDA_CHECK(op, cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming));
    void* host = nullptr;
    const cudaError_t allocated = cudaHostAlloc(&host, buffer.capacity, cudaHostAllocPortable);
    if (allocated != cudaSuccess) cudaEventDestroy(buffer.copied);
    LMC_CUDA_CHECK(op, allocated);
    buffer.host = static_cast<u8*>(host);
    buffers_.push_back(buffer);
    return buffers_.back();
  }

  std::mutex mutex_;
  std::vector<Buffer> buffers_;
  std::size_t next_ = 0;
};

}  // namespace lmc
