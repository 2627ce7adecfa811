// CUDA errors as exceptions that name the operation, the error, and the file and line.
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

// Clears only the error that it reports. An error pending from before the call belongs to the code that caused it.
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

// A function of the driver, as defined in a CUDA version; null if the driver has none.
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

// Allows the calls in a scope while another thread captures a CUDA graph. Otherwise, for example cudaEventSynchronize
// and cudaHostAlloc would end the capture. The exchange fails only for invalid arguments.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes `device` current in a scope, and relaxes capture as RelaxedCapture does.
//
// A thread starts with device 0 current but without a context. The guard does not set device 0 again on such a thread:
// since CUDA 12, cudaSetDevice creates a context, which takes about 0.5 GiB of that device.
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
