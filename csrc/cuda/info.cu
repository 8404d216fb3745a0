// The device as the glue sees it, and what this build can run on.
#include <cuda_runtime.h>

#include "gpu.h"

#ifndef XBN_CUDA_ARCHITECTURES
#define XBN_CUDA_ARCHITECTURES ""
#endif

namespace xbn::cuda {

int use_device(int device, Gpu* gpu) {
  int error = cudaSetDevice(device), major = 0, minor = 0;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  gpu->capability = 10 * major + minor;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu->shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool is_missing_kernel(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

bool is_insufficient_driver(int error) { return error == cudaErrorInsufficientDriver; }

const char* architectures() { return XBN_CUDA_ARCHITECTURES; }

}  // namespace xbn::cuda
