// What the two ways to compute the loss share: how a pair is scored, and the partial results that are added up at the
// end.
#pragma once

#include "device.cuh"

namespace xbn::cuda {

// Which pairs a pass over the bank takes: one Kind, or this.
constexpr int kBoth = kKinds;

// Bits of an anchor's state.
constexpr uint8_t kRanks = 1;   // it is one of the anchors
constexpr uint8_t kFinite = 2;  // so is every value of it

template <typename T>
struct PartialLoss {
  int64_t splits, kinds;
  T* grad;         // [splits, kinds, B, D] sum of weight * bank row, or null
  RowSums* sums;   // [splits, kinds, B]
  uint8_t* state;  // [B]
  T* factor;       // [2] what each kind's sums are multiplied by
};

// An anchor as pairs see it.
struct Anchor {
  int64_t label;
  int64_t exclude;  // the bank row it is not paired with, or -1
  uint8_t state;
};

// The state of anchor i, by a full warp.
template <typename T, typename S>
__device__ __forceinline__ uint8_t anchor_state(const MemoryLossParams<T, S>& p, int64_t i) {
  const bool ranks = p.anchors == nullptr || p.anchors[i];
  return static_cast<uint8_t>((ranks ? kRanks : 0) | (warp_row_is_finite(p.z + i * p.D, p.D) ? kFinite : 0));
}

// The pair of an anchor and bank row `row` with similarity s: its value and weight, zero if it does not count as
// `kind`.
template <typename T, typename Loss>
__device__ __forceinline__ Pair<T> score_pair(const Loss& loss, const Anchor& anchor, int64_t row, int64_t label, T s,
                                              int kind) {
  const bool positive = anchor.label == label;
  if (!(anchor.state & kFinite)) s = static_cast<T>(NAN);
  const Pair<T> pair = positive ? loss.positive(s) : loss.negative(s);
  const bool counts =
      (anchor.state & kRanks) && anchor.exclude != row && (kind == kBoth || positive == (kind == kPositive));
  return counts ? pair : Pair<T>{T(0), T(0)};
}

namespace {

// Sum over the lanes of a group of `width` threads of a warp, in a fixed tree; in all of them.
__device__ __forceinline__ double group_sum(double value, int width) {
  for (int step = 1; step < width; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step, width);
  return value;
}

// Sum over a block of kThreads in a fixed order; in thread 0.
template <int kThreads>
__device__ double block_sum(double value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double partial[kWarps];
  value = group_sum(value, kWarp);
  __syncthreads();  // a former sum has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  return group_sum(threadIdx.x < kWarps ? partial[threadIdx.x] : 0.0, kWarp);
}

}  // namespace

// Adds up the partial results: loss [1] and grad_z [B, D]. In loss_reduce.cu.
template <typename T, typename S>
int launch_reduce(const MemoryLossParams<T, S>& p, const PartialLoss<T>& partial, const Launch& launch);

}  // namespace xbn::cuda
