// CUDA errors as exceptions that name the operation, the error and where it was seen.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lmc {

[[noreturn]] inline void throw_cuda_error(const char* op, cudaError_t error, const char* file, int line) {
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error) + " (" +
                           file + ":" + std::to_string(line) + ")");
}

// Clears the error it reports and no other: one that was pending before the call is its maker's.
#define LMC_CUDA_CHECK(op, call)                             \
  do {                                                       \
    const cudaError_t error_ = (call);                       \
    if (error_ != cudaSuccess) {                             \
      cudaGetLastError();                                    \
      lmc::throw_cuda_error(op, error_, __FILE__, __LINE__); \
    }                                                        \
  } while (0)

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    LMC_CUDA_CHECK(op, cudaGetDevice(&before_));
    if (before_ != device) LMC_CUDA_CHECK(op, cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace lmc
