// What the ways that store similarities, a chunk of the bank at a time, do between their two products: the composite one
// and that of halves. The kernels are in scores.cu.
#pragma once

#include "anchor.cuh"

namespace xbn::cuda {

// Whether a pass is given its numbers as it begins, as the first is, or has what was settled before it.
struct Given {
  bool now;
  const double* values;  // [B], null: zeros
};

// A chunk of the bank and the matrix of its similarities, which become weights. A part of it goes to each split.
template <typename T>
struct ChunkScores {
  T* s;           // [kSlots * B, chunk] similarities in the first B rows; then the weights of the slots that have some
  int64_t first;  // bank rows [first, first + chunk)
  int64_t chunk;
  int64_t part;  // rows of a split: all of them, or, as the following need it, a multiple of 32
  T* rescale;    // [splits, kSlots, B] for the gradient of the chunks before, as exponents have grown

  // For weighted_rows.cu, or null.
  const T* inverse;  // [chunk] what weights are multiplied by
  T* largest;        // [splits, kSlots, B] weight
  uint8_t* some;     // [kSlots, chunk / 32, row_of_some] whether 32 rows have a weight of a group of anchors

  static constexpr int kGroup = 4;  // anchors
  XBN_FORMULA static int64_t row_of_some(int64_t B) { return round_up(ceil_div(B, kGroup), 16); }
};

// Before the first chunk of a pass: states of the anchors, `given`, sums of its slots without a pair. And in `map`
// [2, D], unless it is null, scale and shift of the bank.
template <typename T>
int launch_begin(const RankParams<T>& p, const Pass& pass, const Given& given, const PartialLoss<T>& partial, T* map,
                 const Gpu& gpu);

// The pairs of a chunk go into the sums of their anchors and splits, and similarities become weights, where the pass
// weighs and there is a gradient.
template <typename T>
int launch_scores(const RankParams<T>& p, const Pass& pass, const PartialLoss<T>& partial, const ChunkScores<T>& chunk,
                  const Gpu& gpu);

}  // namespace xbn::cuda
