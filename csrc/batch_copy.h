// Many copies between a GPU and pinned host memory in one call to the driver.
#pragma once

#include <vector>

#include "error.h"
#include "launch.h"

namespace lmc {

// A piece that is contiguous both in device memory (a page or a buffer) and in a payload.
struct Fragment {
  u8* device;
  u8* payload;
  u64 bytes;
};

// Enqueues the copies on `stream`, which must not be the default one: to the payloads, or from them; in one call if the
// payloads are pinned and the driver supports it, else one by one. The copies follow the stream's order, but have none
// among themselves. Payloads may be read before earlier work on the stream is done.
inline void copy_fragments(const char* op, const std::vector<Fragment>& fragments, bool to_payloads, bool is_pinned,
                           cudaStream_t stream) {
#if defined(LMC_HOST_CUDA) || CUDART_VERSION >= 12080
  // Later drivers keep this signature for version 12.8.
  const auto copy_batch = driver_function<PFN_cuMemcpyBatchAsync_v12080>(op, "cuMemcpyBatchAsync", 12080);
  if (is_pinned && copy_batch && !fragments.empty()) {
    std::vector<CUdeviceptr> to, from;
    std::vector<std::size_t> sizes;
    for (const Fragment& fragment : fragments) {
      const auto device = reinterpret_cast<CUdeviceptr>(fragment.device);
      const auto payload = reinterpret_cast<CUdeviceptr>(fragment.payload);
      to.push_back(to_payloads ? payload : device);
      from.push_back(to_payloads ? device : payload);
      sizes.push_back(fragment.bytes);
    }
    CUmemcpyAttributes attributes{};
    // Any other order may read device memory before earlier work on the stream has written it.
    attributes.srcAccessOrder = to_payloads ? CU_MEMCPY_SRC_ACCESS_ORDER_STREAM : CU_MEMCPY_SRC_ACCESS_ORDER_ANY;
    attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    std::size_t first = 0, failed = 0;
    const CUresult result = copy_batch(to.data(), from.data(), sizes.data(), sizes.size(), &attributes, &first, 1,
                                       &failed, reinterpret_cast<CUstream>(stream));
    if (result == CUDA_SUCCESS) return;
    if (result != CUDA_ERROR_NOT_SUPPORTED)
      throw std::runtime_error(std::string(op) + ": cuMemcpyBatchAsync: error " + std::to_string(result) +
                               " of the CUDA driver");
  }
#endif
  for (const Fragment& fragment : fragments)
    LMC_CUDA_CHECK(op, cudaMemcpyAsync(to_payloads ? fragment.payload : fragment.device,
                                       to_payloads ? fragment.device : fragment.payload, fragment.bytes,
                                       to_payloads ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream));
}

}  // namespace lmc
