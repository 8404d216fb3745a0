// Phase 2 of the sweep: the similarities of a tile, which the square of threads has in registers, become weights, and
// what they say of each anchor is added to its sums. Each 16 neighbouring threads share their anchors, and add up by
// shuffles; sums are in shared memory, in double, one tile after the other.
#pragma once

#include "tile.cuh"

namespace xbn::cuda {
namespace {

// Sum over the 16 threads that share an anchor.
template <typename T>
__device__ __forceinline__ T anchor_sum(T value) {
#pragma unroll
  for (int step = 1; step < kSide; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The pairs of a thread: kSquare anchors x 4 rows. A bit for each of them, 4 * i + j.
struct ThreadPairs {
  unsigned on = 0;        // whether the slot has the pair
  unsigned positive = 0;  // and is it a positive one
};

// The three kinds of formulas: each adds what the tile contributes to the anchors' sums, and turns similarities into
// weights.
template <int kDim, typename F>
__device__ __forceinline__ void add_scores(Shared<kDim>& shared, const F& formula, const ThreadPairs& pairs,
                                           float (&s)[Shape<kDim>::kSquare][4]) {
  constexpr int kSquare = Shape<kDim>::kSquare;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kSquare; ++i) {
    const float given = shared.anchors[kSquare * y + i].given;
    float value = 0, weight = 0;
    int counted = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool on = pairs.on >> (4 * i + j) & 1u, positive = pairs.positive >> (4 * i + j) & 1u;
      const Score<float> score = formula(s[i][j], positive, given);
      s[i][j] = on ? score.weight : 0.0f;
      value += on ? score.value : 0.0f;
      weight += s[i][j];
      counted += on && score.counts;
    }
    value = anchor_sum(value), weight = anchor_sum(weight), counted = anchor_sum(counted);
    if (x != 0) continue;
    RowSums& sums = shared.sums[kSquare * y + i];
    sums.value += value, sums.weight += weight, sums.pairs += counted;
  }
}

// Returns whether this thread's anchors have a larger exponent than before; then `rescale` says by how much.
template <int kDim, typename F>
__device__ __forceinline__ bool add_exponents(Shared<kDim>& shared, const F& formula, const ThreadPairs& pairs,
                                              float (&s)[Shape<kDim>::kSquare][4]) {
  constexpr int kSquare = Shape<kDim>::kSquare;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  bool grown = false;
#pragma unroll
  for (int i = 0; i < kSquare; ++i) {
    RowSums& sums = shared.sums[kSquare * y + i];
    const float given = shared.anchors[kSquare * y + i].given, before = static_cast<float>(sums.shift);
    Exponent<float> e[4];
    float top = before;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      e[j] = formula(s[i][j], pairs.positive >> (4 * i + j) & 1u, given);
      e[j].counts = e[j].counts && (pairs.on >> (4 * i + j) & 1u);
      if (e[j].counts && e[j].x > top) top = e[j].x;
    }
#pragma unroll
    for (int step = 1; step < kSide; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, top, step);
      if (other > top) top = other;
    }
    float value = 0;
    int counted = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float term = e[j].counts ? exp_of_negative(e[j].x - top) : 0.0f;
      s[i][j] = e[j].counts ? e[j].slope * term : 0.0f;
      value += term;
      counted += e[j].counts;
    }
    value = anchor_sum(value), counted = anchor_sum(counted);
    __syncwarp();  // all 16 have read the shift
    grown = grown || top > before;
    if (x != 0) continue;
    const float rescale = top > before ? expf(before - top) : 1.0f;
    shared.rescale[kSquare * y + i] = rescale;
    sums = {sums.value * rescale + value, 0.0, sums.pairs + counted, static_cast<double>(top)};
  }
  return grown;
}

template <int kDim>
__device__ __forceinline__ void add_extremes(Shared<kDim>& shared, int64_t begin, const ThreadPairs& pairs,
                                             float (&s)[Shape<kDim>::kSquare][4]) {
  constexpr int kSquare = Shape<kDim>::kSquare;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
  for (int i = 0; i < kSquare; ++i) {
    Extreme<float> best = {-INFINITY, -1};
    int counted = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool on = pairs.on >> (4 * i + j) & 1u, positive = pairs.positive >> (4 * i + j) & 1u;
      if (on) best.take({positive ? -s[i][j] : s[i][j], 4 * x + j});
      counted += on;
      s[i][j] = 0;
    }
#pragma unroll
    for (int step = 1; step < kSide; step *= 2)
      best.take(
          {__shfl_xor_sync(0xffffffffu, best.x, step), __shfl_xor_sync(0xffffffffu, static_cast<int>(best.row), step)});
    counted = anchor_sum(counted);
    if (x != 0) continue;
    RowSums& sums = shared.sums[kSquare * y + i];
    const double row = best.row < 0 ? -1.0 : static_cast<double>(begin + best.row);
    sums = add(Formula::extreme, sums, {row, 0, static_cast<double>(counted), best.x});
  }
}

// What phase 2 leaves for phase 3.
struct Scored {
  int rows;      // with an active pair
  bool rescale;  // the gradient so far
};

// Phase 2: scores the pairs of a slot, adds up their values, and leaves the weights of the rows with an active pair in
// shared memory.
template <int kDim>
__device__ __forceinline__ Scored score_tile(Shared<kDim>& shared, int64_t begin, int rows, bool gradient,
                                             float (&dot)[Shape<kDim>::kSquare][4]) {
  constexpr int kAnchors = Shape<kDim>::kAnchors, kSquare = Shape<kDim>::kSquare;
  const int thread = hidden(static_cast<int>(threadIdx.x)), x = thread % kSide, y = thread / kSide;
  const Slot& slot = shared.slot;
  ThreadPairs pairs;
#pragma unroll 1  // a pair's label and id take eight registers: not those of all pairs at a time
  for (int i = 0; i < kSquare; ++i) {
    const Anchor<float> anchor = shared.anchors[kSquare * y + i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool positive = anchor.label == shared.labels[4 * x + j];
      const bool on = 4 * x + j < rows && anchor.pairs_with(shared.ids[4 * x + j], positive, slot.pairs);
      pairs.on |= static_cast<unsigned>(on) << (4 * i + j);
      pairs.positive |= static_cast<unsigned>(positive) << (4 * i + j);
    }
  }
  float inverse_norm[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) inverse_norm[j] = shared.inverse_norm[4 * x + j];
#pragma unroll
  for (int i = 0; i < kSquare; ++i) {
    const bool finite = shared.anchors[kSquare * y + i].state & kFinite;
#pragma unroll
    for (int j = 0; j < 4; ++j) dot[i][j] = finite ? dot[i][j] * inverse_norm[j] : NAN;
  }
  bool grown = false;
  if (slot.formula == Formula::extreme) {
    add_extremes<kDim>(shared, begin, pairs, dot);
  } else {
    with_formula<float>(slot, [&](const auto& formula) {
      if constexpr (std::decay_t<decltype(formula)>::kExponential)
        grown = add_exponents<kDim>(shared, formula, pairs, dot);
      else
        add_scores<kDim>(shared, formula, pairs, dot);
    });
  }
  if (!gradient) {
    __syncthreads();  // all have read the labels of this tile
    return {0, false};
  }
  bool any[4] = {};
#pragma unroll
  for (int i = 0; i < kSquare; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      any[j] |= dot[i][j] != 0.0f;
      dot[i][j] *= inverse_norm[j];
    }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // A warp is two rows of the square: lanes x and 16 + x have the same bank rows.
    const unsigned lanes = __ballot_sync(0xffffffffu, any[j]);
    if (thread % kWarp == 0) shared.active[thread / kWarp][j] = (lanes | lanes >> kSide) & 0xffffu;
  }
  const bool rescale = __syncthreads_or(grown);

  // The active rows move together: a row's place is the number of active rows before it, in the order of j, then x.
  // All threads count alike from the bits. Weights go to that place.
  int before = 0;  // active rows of lower j
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unsigned columns = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) columns |= shared.active[warp][j];
    if (columns >> x & 1u) {
      const int place = before + __popc(columns & ((1u << x) - 1u));
      if (y == 0) shared.list[place] = 4 * x + j;
      float* at = shared.weights() + weight_at<kAnchors>(place, kSquare * y >> 2) + (kSquare * y & 3);
      if constexpr (kSquare == 4)
        *reinterpret_cast<float4*>(at) = make_float4(dot[0][j], dot[1][j], dot[2][j], dot[3][j]);
      else
        *reinterpret_cast<float2*>(at) = make_float2(dot[0][j], dot[1][j]);
    }
    before += __popc(columns);
  }
  __syncthreads();
  return {before, rescale};
}

}  // namespace
}  // namespace xbn::cuda
