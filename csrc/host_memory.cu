// Pinning of host memory that somebody else allocated, such as a slab that several processes map.
#include "error.h"
#include "ops.h"

namespace lmc::cuda {

void register_host(int device, void* address, u64 bytes, u64 piece_bytes) {
  const char* op = "register_host";
  const DeviceGuard guard(op, device);
  u8* first = static_cast<u8*>(address);
  u64 done = 0;
  try {
    for (; done < bytes; done += piece_bytes)
      LMC_CUDA_CHECK(op, cudaHostRegister(first + done, std::min(piece_bytes, bytes - done),
                                          cudaHostRegisterPortable | cudaHostRegisterMapped));
  } catch (...) {
    for (u64 i = 0; i < done; i += piece_bytes) cudaHostUnregister(first + i);
    throw;
  }
}

void unregister_host(int device, void* address, u64 bytes, u64 piece_bytes) {
  const char* op = "unregister_host";
  const DeviceGuard guard(op, device);
  for (u64 i = 0; i < bytes; i += piece_bytes) LMC_CUDA_CHECK(op, cudaHostUnregister(static_cast<u8*>(address) + i));
}

}  // namespace lmc::cuda
