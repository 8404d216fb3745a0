// What the kernels share: launching, temporary memory, small reductions. Plain CUDA C++; kernels are launched with
// cudaLaunchKernelEx, a template of <cuda_runtime.h>, so that a stand-in for that header can run the same source on a
// CPU.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"
#include "gpu.h"

namespace xbn::cuda {

constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// With so many bytes of dynamic shared memory in each block.
template <typename... Parameters, typename... Arguments>
int run_with_memory(int bytes, void (*kernel)(Parameters...), dim3 grid, int block, const Gpu& gpu,
                    Arguments&&... arguments) {
  if (bytes > 0) {  // more than 48 KB a GPU gives to a kernel that has asked
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(gpu.stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
int run(void (*kernel)(Parameters...), dim3 grid, int block, const Gpu& gpu, Arguments&&... arguments) {
  return run_with_memory(0, kernel, grid, block, gpu, static_cast<Arguments&&>(arguments)...);
}

// The dynamic shared memory of this block.
template <typename T>
__device__ __forceinline__ T& dynamic_shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return *reinterpret_cast<T*>(memory);
#else
  return *static_cast<T*>(emu::executor.dynamic_shared_memory());
#endif
}

// Cuts arrays out of a workspace. Without one it only counts the bytes.
class Carver {
 public:
  explicit Carver(void* workspace) : begin_(static_cast<char*>(workspace)) {}

  template <typename T>
  T* take(int64_t n) {
    T* array = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + used_);
    used_ += ceil_div(n * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return array;
  }
  int64_t bytes() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

// A workspace, made by its constructor (memory, sizes...), which without memory counts the `bytes` that it takes.
template <typename Workspace, typename... Sizes>
Workspace make_workspace(const Gpu& gpu, const Sizes&... sizes) {
  return Workspace(gpu.workspace(Workspace(nullptr, sizes...).bytes), sizes...);
}

// Values next to each other in memory that are read and written at once.
template <typename S, int kWidth>
struct alignas(kWidth * sizeof(S)) Vector {
  S value[kWidth];
};

template <typename S, int kWidth>
bool is_aligned(const S* values) {
  return reinterpret_cast<uintptr_t>(values) % alignof(Vector<S, kWidth>) == 0;
}

// Stored rows. A damaged counter must not become a wild access; a kernel cannot report it.
__device__ __forceinline__ int64_t stored_rows(const int64_t* count, int64_t M) {
  if (count == nullptr) return M;
  return larger(0, smaller(*count, M));
}

// 0 * x is 0 for every finite x and NaN for the others.
template <typename T>
__device__ __forceinline__ bool is_finite(T x) {
  return T(0) * x == T(0);
}

// Whether all lanes of a full warp agree that their part of a row is finite. The result is the same in every lane.
template <typename T>
__device__ __forceinline__ bool warp_row_is_finite(const T* row, int64_t D) {
  bool finite = true;
  for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp)
    finite &= is_finite(row[d]);  // no branch, so the loads overlap
  return __all_sync(0xffffffffu, finite);
}

// The same number, but the compiler knows nothing about it.
__device__ __forceinline__ int hidden(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The same, and no read that stands before it comes after it.
__device__ __forceinline__ double hidden(double x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x)::"memory");
#endif
  return x;
}

// Asks for n values to be brought to the second-level cache, by all threads of a block. n <= 0: nothing.
template <int kThreads, typename S>
__device__ __forceinline__ void prefetch_by_block(const S* begin, int64_t n) {
#ifdef __CUDA_ARCH__
  constexpr int kLine = 128 / sizeof(S);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kLine; i < n; i += kThreads * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + i));
#endif
}

// Asks for the n values of a row to be brought there, by a full warp.
template <typename S>
__device__ __forceinline__ void prefetch_by_warp(const S* row, int64_t n) {
#ifdef __CUDA_ARCH__
  constexpr int kLine = 128 / sizeof(S);
  for (int64_t i = static_cast<int64_t>(threadIdx.x % kWarp) * kLine; i < n; i += kWarp * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + i));
#endif
}

// Starts to copy four values to shared memory, or zeros if they do not exist; both addresses are multiples of their
// bytes.
template <typename S>
__device__ __forceinline__ void copy4_async(S* to, const S* from, bool exist) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to)), bytes = exist ? 4 * sizeof(S) : 0;
  if constexpr (sizeof(S) == 4)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#else
  using Four = Vector<S, 4>;
  *reinterpret_cast<Four*>(to) = exist ? *reinterpret_cast<const Four*>(from) : Four{};
#endif
}

// Waits for the copies of this thread. A barrier then makes them known to the others.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Announces that this block has written its part of a workspace; true in the block that comes last, which then sees the
// parts of all. To be called by all threads of a block; `ticket` starts at 0, `flag` is shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks, bool* flag) {
  __threadfence();  // by every thread: what it wrote, before the ticket is taken
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return *flag;
}

}  // namespace xbn::cuda
