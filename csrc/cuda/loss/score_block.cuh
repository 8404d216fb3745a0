// The block scorer: all threads of a block score the pairs of its anchors, whose similarities are in memory, a row of
// columns to an anchor. Columns are rows of a chunk of the bank (scores.cu) or of the batch (batch_loss.cu).
//
// A kind of sum (of scores, of exponents, an extreme) is written here and in score.cuh, which has the similarities of a
// sweep's tiles in registers; that of margins also in pairs.cu, for single pairs.
//
//   in     pairs, a struct of the caller's, which tells of its block
//            kAnchors, anchors[kAnchors], has(a)          which anchors of it there are
//            columns, exists(j), row(j), label(j), id(j)  which columns, and the row that is in column j
//            similarity(a, j)
//   out    sums [kAnchors], to which the pairs are added; weights, as the caller keeps them
//   order  a thread takes every 256th column, threads are added up in a fixed tree: the same bits every run
#pragma once

#include "anchor.cuh"

namespace xbn::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

// Whether a block's only anchor is paired with the row in column j, by a slot of such pairs.
template <typename BlockPairs>
__device__ __forceinline__ bool has_pair(const BlockPairs& block, int64_t j, Pairs pairs) {
  if (!block.exists(j)) return false;
  const int64_t id = block.id(j);
  return block.anchors[0].pairs_with(id, block.label(j) == block.anchors[0].label, pairs);
}

// f(anchor of the block, column, similarity, whether positive, whether a slot of such pairs has it), of the columns of
// this thread.
template <typename BlockPairs, typename F>
__device__ __forceinline__ void each_pair(const BlockPairs& block, Pairs pairs, const F& f) {
  for (int64_t j = threadIdx.x; j < block.columns; j += kBlockThreads) {
    const bool exists = block.exists(j);
    const int64_t label = exists ? block.label(j) : 0;
    const int64_t id = exists ? block.id(j) : kRowWithoutId;
#pragma unroll
    for (int a = 0; a < BlockPairs::kAnchors; ++a) {
      if (!block.has(a)) break;
      const bool positive = block.anchors[a].label == label;
      const bool on = exists && block.anchors[a].pairs_with(id, positive, pairs);
      f(a, j, block.similarity(a, j), positive, on);
    }
  }
}

// What a pair adds to the sums of its anchor, and its weight. Exponents are scaled by e^-shift.
template <typename T, typename F>
__device__ __forceinline__ Score<T> score_of(const F& formula, T s, bool positive, bool on, T given, T shift) {
  if constexpr (F::kExponential) {
    const Exponent<T> e = formula(s, positive, given);
    const bool counts = on && e.counts;
    const T term = counts ? exp_of_negative(e.x - shift) : T(0);
    return {term, counts ? e.slope * term : T(0), counts};
  } else {
    const Score<T> score = formula(s, positive, given);
    return {on ? score.value : T(0), on ? score.weight : T(0), on && score.counts};
  }
}

// Of score_pairs: the weights are not kept.
struct NoWeights {
  template <typename T>
  __device__ __forceinline__ void weight(int, int64_t, T) const {}
  template <typename T>
  __device__ __forceinline__ void rescale(int, T) const {}
};

// Adds the pairs of a slot to the sums of their anchors; by all threads of the block. Thread a writes what anchor a
// has.
//   kept.weight(anchor, column, weight)  for every pair, by its thread, columns of a warp together; not of extremes
//   kept.rescale(anchor, factor)         of exponents, what weights that were kept before are to be multiplied by
template <typename T, typename BlockPairs, typename Kept>
__device__ __forceinline__ void score_pairs(const BlockPairs& block, const Slot& slot, RowSums* sums, Kept&& kept) {
  constexpr int kAnchors = BlockPairs::kAnchors;
  const int mine = static_cast<int>(threadIdx.x);  // the first threads, one to an anchor
  T value[kAnchors] = {}, weight[kAnchors] = {}, shift[kAnchors] = {};
  int pairs[kAnchors] = {};
  if (slot.formula == Formula::extreme) {
    Extreme<T> best[kAnchors];
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) best[a] = {static_cast<T>(-INFINITY), -1};
    each_pair(block, slot.pairs, [&](int a, int64_t j, T s, bool positive, bool on) {
      if (on) best[a].take({positive ? -s : s, block.row(j)});
      pairs[a] += on;
    });
    double counts[kAnchors];
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) counts[a] = pairs[a];
    const BlockExtremes<kBlockThreads, kAnchors, T> bests(best);
    const BlockSums<kBlockThreads, kAnchors> all(counts);
    if (mine >= kAnchors || !block.has(mine)) return;
    const Extreme<T> extreme = bests[mine];
    const RowSums of_block = {static_cast<double>(extreme.row), 0, all[mine], static_cast<double>(extreme.x)};
    sums[mine] = add(slot.formula, sums[mine], of_block);
    return;
  }
  with_formula<T>(slot, [&](const auto& formula) {
    constexpr bool kExponential = std::decay_t<decltype(formula)>::kExponential;
    if constexpr (kExponential) {
      T before[kAnchors];
#pragma unroll
      for (int a = 0; a < kAnchors; ++a)
        before[a] = shift[a] = block.has(a) ? static_cast<T>(sums[a].shift) : static_cast<T>(-INFINITY);
      each_pair(block, slot.pairs, [&](int a, int64_t, T s, bool positive, bool on) {
        const Exponent<T> e = formula(s, positive, block.anchors[a].given);
        if (on && e.counts && e.x > shift[a]) shift[a] = e.x;
      });
      const BlockTops<kBlockThreads, kAnchors, T> tops(shift);
#pragma unroll
      for (int a = 0; a < kAnchors; ++a) {
        shift[a] = tops[a];
        if (threadIdx.x == 0 && block.has(a))
          kept.rescale(a, shift[a] > before[a] ? std::exp(before[a] - shift[a]) : T(1));
      }
    }
    each_pair(block, slot.pairs, [&](int a, int64_t j, T s, bool positive, bool on) {
      const Score<T> score = score_of(formula, s, positive, on, block.anchors[a].given, shift[a]);
      value[a] += score.value;
      if constexpr (!kExponential) weight[a] += score.weight;
      pairs[a] += score.counts;
      kept.weight(a, j, score.weight);
    });
  });
  double values[3 * kAnchors];
#pragma unroll
  for (int a = 0; a < kAnchors; ++a)
    values[a] = value[a], values[kAnchors + a] = weight[a], values[2 * kAnchors + a] = pairs[a];
  const BlockSums<kBlockThreads, 3 * kAnchors> all(values);
  if (mine >= kAnchors || !block.has(mine)) return;
  double shift_of_mine = 0;
#pragma unroll
  for (int a = 0; a < kAnchors; ++a)
    if (a == mine) shift_of_mine = shift[a];
  const RowSums of_block = {all[mine], all[kAnchors + mine], all[2 * kAnchors + mine], shift_of_mine};
  sums[mine] = add(slot.formula, sums[mine], of_block);
}

// The weight of one of the slot's pairs once all are in the sums: for those who look at the pairs again rather than
// keep it.
template <typename T>
__device__ __forceinline__ T weight_of(const Slot& slot, const RowSums& sums, T given, int64_t row, T s,
                                       bool positive) {
  if (slot.formula == Formula::extreme) return static_cast<double>(row) == sums.value ? T(1) : T(0);
  T weight = 0;
  with_formula<T>(slot, [&](const auto& formula) {
    weight = score_of(formula, s, positive, true, given, static_cast<T>(sums.shift)).weight;
  });
  return weight;
}

}  // namespace
}  // namespace xbn::cuda
