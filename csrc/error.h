// CUDA errors as exceptions that name the operation, the error and where it was seen.
#pragma once

#include <cudaTypedefs.h>
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

inline bool is_captured(const char* op, void* stream) {
  cudaStreamCaptureStatus status{};
  LMC_CUDA_CHECK(op, cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

// A function of the driver as of a CUDA version; null where the driver has none.
template <typename Function>
Function driver_function(const char* op, const char* name, [[maybe_unused]] unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if defined(LMC_HOST_CUDA) || CUDART_VERSION >= 12050
  LMC_CUDA_CHECK(op, cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found));
#else
  LMC_CUDA_CHECK(op, cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  return reinterpret_cast<Function>(function);
}

// Lets the calls of a scope pass while another thread captures a CUDA graph, which cudaEventSynchronize and
// cudaHostAlloc, for example, would otherwise end. The exchange fails for arguments that are wrong only.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes `device` current for a scope, whose calls are those of RelaxedCapture.
//
// A thread starts with device 0 current but without a context. The guard does not set device 0 again on such a thread:
// since CUDA 12, cudaSetDevice makes a context, which takes some 0.5 GiB of that device.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    static const auto current_context = driver_function<PFN_cuCtxGetCurrent_v4000>(op, "cuCtxGetCurrent", 4000);
    CUcontext context = nullptr;
    const bool has_context = current_context(&context) == CUDA_SUCCESS && context;
    LMC_CUDA_CHECK(op, cudaGetDevice(&before_));
    if (before_ == device) return;
    LMC_CUDA_CHECK(op, cudaSetDevice(device));
    restore_ = has_context;
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  RelaxedCapture relaxed_;
  int before_ = 0;
  bool restore_ = false;
};

}  // namespace lmc
