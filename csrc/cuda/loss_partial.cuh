// What the two ways to compute the loss share: how a pair is scored, and the partial results that are added up at the
// end.
#pragma once

#include "device.cuh"

namespace xbn::cuda {

// Positives and negatives may have a gradient of their own, because some reductions scale them apart.
enum Kind { kNegative = 0, kPositive = 1, kBoth = 2 };

// An anchor's sums over its pairs of one kind.
struct RowSums {
  double value;   // pair values
  double active;  // pairs with a non-zero weight
};

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

// The pair of an anchor and bank row `row` with similarity s: its value and weight, zero if it does not count as
// `kind`.
template <typename T, typename Loss>
__device__ __forceinline__ Pair<T> score_pair(const Loss& loss, const Anchor& anchor, int64_t row, int64_t label, T s,
                                              Kind kind) {
  const bool positive = anchor.label == label;
  if (!(anchor.state & kFinite)) s = static_cast<T>(NAN);
  const Pair<T> pair = positive ? loss.positive(s) : loss.negative(s);
  const bool counts =
      (anchor.state & kRanks) && anchor.exclude != row && (kind == kBoth || positive == (kind == kPositive));
  return counts ? pair : Pair<T>{T(0), T(0)};
}

// Adds up the partial results: loss [1] and grad_z [B, D]. In loss_reduce.cu.
template <typename T, typename S>
int launch_reduce(const MemoryLossParams<T, S>& p, const PartialLoss<T>& partial, const Launch& launch);

}  // namespace xbn::cuda
