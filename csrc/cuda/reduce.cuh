// What the threads of a block put together: sums, largest values.
#pragma once

#include "device.cuh"

namespace xbn::cuda {

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Never NaN if `a` is not.
struct Largest {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// A struct has an overload of its own, in its namespace: BlockReduction finds it there.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int step) {
  return __shfl_xor_sync(0xffffffffu, value, step);
}

// kCount values of every thread of a block become one of each kind, which any thread may ask for. The order is fixed.
//
// A step of a butterfly halves what there is: each of two lanes keeps one half of the values and is given the other
// lane's. That moves about kCount values, where a butterfly for each would move five times as many, and two barriers do
// for all.
template <int kThreads, int kCount, typename T, typename Op>
class BlockReduction {
 public:
  // By all threads of the block.
  __device__ __forceinline__ explicit BlockReduction(const T (&values)[kCount]) {
    __shared__ T partial[kWarps][kPadded];
    partial_ = partial;
    T value[kPadded] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) value[k] = values[k];
    const int lane = threadIdx.x % kWarp, held = reduce<kPadded, 1>(value, lane);
    __syncthreads();  // the results of a former one have been read
    if (lane < kPadded) partial[threadIdx.x / kWarp][held] = value[0];
    __syncthreads();
  }

  __device__ __forceinline__ T operator[](int k) const {
    T value = partial_[0][k];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = Op()(value, partial_[warp][k]);
    return value;
  }

 private:
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int padded(int count) { return count > 1 ? 2 * padded((count + 1) / 2) : 1; }
  static constexpr int kPadded = padded(kCount);
  static_assert(kPadded <= kWarp);

  // The first `count` of `value` become the warp's, one to a lane, as value[0]: returns which. Lanes that differ in
  // higher bits than there are values for have the same one.
  template <int count, int step>
  __device__ __forceinline__ static int reduce(T (&value)[kPadded], int lane) {
    constexpr int half = count / 2;
    int upper = 0;
    if constexpr (count == 1) {
      value[0] = Op()(value[0], shuffle_xor(value[0], step));
    } else {
      upper = (lane & step) != 0;
#pragma unroll
      for (int k = 0; k < half; ++k) {
        const T given = shuffle_xor(upper ? value[k] : value[k + half], step);
        value[k] = Op()(upper ? value[k + half] : value[k], given);
      }
    }
    if constexpr (2 * step < kWarp)
      return upper * half + reduce<(count > 1 ? half : 1), 2 * step>(value, lane);
    else
      return upper * half;
  }

  const T (*partial_)[kPadded];
};

template <int kThreads, int kCount>
using BlockSums = BlockReduction<kThreads, kCount, double, Sum>;

template <int kThreads, int kCount, typename T>
using BlockTops = BlockReduction<kThreads, kCount, T, Largest>;

}  // namespace xbn::cuda
