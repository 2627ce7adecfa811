// Many copies between a GPU and pinned host memory in one call to the driver.
#pragma once

#include <vector>

#include "error.h"
#include "launch.h"

#if defined(LMC_HOST_CUDA) || CUDART_VERSION >= 12080
#include <cudaTypedefs.h>
#define LMC_HAS_BATCH_COPIES 1
#endif

namespace lmc {

// What is contiguous both in a cache and in a payload.
struct Fragment {
  u8* cache;
  u8* payload;
  u64 bytes;
};

#ifdef LMC_HAS_BATCH_COPIES
// cuMemcpyBatchAsync as CUDA 12.8 has it, whose signature later drivers keep under that version; null where the driver
// has none.
inline PFN_cuMemcpyBatchAsync_v12080 batch_copy_function(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  LMC_CUDA_CHECK(op,
                 cudaGetDriverEntryPointByVersion("cuMemcpyBatchAsync", &function, 12080, cudaEnableDefault, &found));
  return reinterpret_cast<PFN_cuMemcpyBatchAsync_v12080>(function);
}
#endif

// Enqueues the copies on `stream`, not the default one: to the payloads, or from them. In one call if the driver has
// it, else one by one. They are in the order of the stream, and in none among themselves.
inline void copy_fragments(const char* op, const std::vector<Fragment>& fragments, bool to_payloads,
                           cudaStream_t stream) {
#ifdef LMC_HAS_BATCH_COPIES
  if (const auto copy_batch = batch_copy_function(op)) {
    std::vector<CUdeviceptr> to, from;
    std::vector<std::size_t> sizes;
    for (const Fragment& fragment : fragments) {
      const auto cache = reinterpret_cast<CUdeviceptr>(fragment.cache);
      const auto payload = reinterpret_cast<CUdeviceptr>(fragment.payload);
      to.push_back(to_payloads ? payload : cache);
      from.push_back(to_payloads ? cache : payload);
      sizes.push_back(fragment.bytes);
    }
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;  // any other may read before what the stream holds
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
    LMC_CUDA_CHECK(op, cudaMemcpyAsync(to_payloads ? fragment.payload : fragment.cache,
                                       to_payloads ? fragment.cache : fragment.payload, fragment.bytes,
                                       to_payloads ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream));
}

}  // namespace lmc
