// Stands in for CUDA's <cuda_runtime.h> where g++ compiles kernels for the CPU: -x c++ -std=c++20 -I tests/emu/include.
//
// Not here: kernel<<<>>>, extern __shared__ (see dynamic_shared_memory() of the executor), launch attributes, inline
// PTX, half types, streams that run side by side, blocks that wait for other blocks. The order of qualifiers matters to
// g++: alignas(16) __shared__ float x[4].
#pragma once
#include <cstddef>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "device_functions.h"
#include "device_types.h"
#include "executor.h"
#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Blocks run one after the other, so that one copy serves all.
#define __shared__ EMU_SHARED_VARIABLE

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
  }
  return "unrecognized error code";
}

namespace [[gnu::visibility("hidden")]] emu {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace emu

inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }

// One device.
inline cudaError_t cudaSetDevice(int device) { return emu::report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emu::report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emu::settings().multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emu::settings().shared_memory; return cudaSuccess;
  }
  return emu::report(cudaErrorInvalidValue);
}

// All work is done, in order, when the call that asks for it returns.
using cudaStream_t = struct CUstream_st*;

inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace [[gnu::visibility("hidden")]] emu {

// How much dynamic shared memory a kernel may have in each block: 48 KB, unless it has asked for more.
inline std::unordered_map<const void*, std::size_t> asked_dynamic_bytes;
inline constexpr std::size_t kUsualDynamicBytes = 48 << 10;

inline std::size_t dynamic_bytes_of(const void* kernel) {
  const auto found = asked_dynamic_bytes.find(kernel);
  return found == asked_dynamic_bytes.end() ? kUsualDynamicBytes : found->second;
}

}  // namespace emu

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > emu::settings().shared_memory)
    return emu::report(cudaErrorInvalidValue);
  emu::asked_dynamic_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      block.x == 0 || block.x > emu::kMaxThreads || block.y == 0 || block.y > emu::kMaxThreads || block.z == 0 ||
      block.z > 64 || block.x * block.y * block.z > emu::kMaxThreads) {
    return emu::report(cudaErrorInvalidConfiguration);
  }
  if (config->numAttrs != 0) return emu::report(cudaErrorInvalidValue);
  if (config->dynamicSmemBytes > emu::dynamic_bytes_of(reinterpret_cast<const void*>(kernel)))
    return emu::report(cudaErrorInvalidValue);
  if (emu::settings().launch_error != 0) return emu::report(static_cast<cudaError_t>(emu::settings().launch_error));
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  emu::executor.launch(grid, block,
                       {reinterpret_cast<const void*>(kernel),
                        [](const void* data) {
                          const Call& call = *static_cast<const Call*>(data);
                          std::apply(call.kernel, call.arguments);
                        },
                        &call, config->dynamicSmemBytes});
  return cudaSuccess;
}
