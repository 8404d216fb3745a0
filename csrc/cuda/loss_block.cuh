// What the threads of a block find out together about the pairs of an anchor.
#pragma once

#include "loss_partial.cuh"

namespace xbn::cuda {

// Largest over a block; in all threads. Never NaN.
template <int kThreads, typename T>
__device__ __forceinline__ T block_top(T value) {
  __shared__ T tops[kThreads / kWarp];
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    if (other > value) value = other;
  }
  __syncthreads();  // former ones have been read
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kThreads / kWarp; ++warp)
    if (tops[warp] > value) value = tops[warp];
  return value;
}

// The best over a block; in all threads.
template <int kThreads, typename T>
__device__ __forceinline__ Extreme<T> block_extreme(Extreme<T> best) {
  __shared__ Extreme<T> bests[kThreads / kWarp];
  for (int step = 1; step < kWarp; step *= 2)
    best.take({__shfl_xor_sync(0xffffffffu, best.x, step), __shfl_xor_sync(0xffffffffu, best.row, step)});
  __syncthreads();
  if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
  __syncthreads();
  for (int warp = 0; warp < kThreads / kWarp; ++warp) best.take(bests[warp]);
  return best;
}

}  // namespace xbn::cuda
