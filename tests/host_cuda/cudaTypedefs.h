// The stand-in's version of this CUDA header: only the part that csrc/ uses.
#pragma once

#include "cuda_runtime.h"

using CUdeviceptr = unsigned long long;
using CUstream = cudaStream_t;
enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_NOT_SUPPORTED = 801,
};
enum CUmemcpySrcAccessOrder {
  CU_MEMCPY_SRC_ACCESS_ORDER_INVALID = 0,
  CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1,
  CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL = 2,
  CU_MEMCPY_SRC_ACCESS_ORDER_ANY = 3,
};
enum CUmemcpyFlags { CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1 };
struct CUmemLocation {
  int type, id;
};
struct CUmemcpyAttributes {
  CUmemcpySrcAccessOrder srcAccessOrder;
  CUmemLocation srcLocHint, dstLocHint;
  unsigned flags;
};
using CUcontext = struct CUctx_st*;
using PFN_cuCtxGetCurrent_v4000 = CUresult (*)(CUcontext* context);
using PFN_cuMemcpyBatchAsync_v12080 = CUresult (*)(CUdeviceptr* to, CUdeviceptr* from, std::size_t* sizes,
                                                   std::size_t count, CUmemcpyAttributes* attributes,
                                                   std::size_t* first_of_attributes, std::size_t num_attributes,
                                                   std::size_t* failed, CUstream stream);

enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1,
  cudaDriverEntryPointVersionNotSufficent = 2,
};
constexpr unsigned long long cudaEnableDefault = 0;
// Knows cuCtxGetCurrent and, if host_cuda::options().batch_copies, cuMemcpyBatchAsync.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* found);
