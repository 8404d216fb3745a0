// What the ways to compute the loss share: the partial results that are added up at the end, and what a pair needs of
// its anchor.
#pragma once

#include "../reduce.cuh"

namespace xbn {

__device__ __forceinline__ RowSums shuffle_xor(const RowSums& sums, int step) {
  return {cuda::shuffle_xor(sums.value, step), cuda::shuffle_xor(sums.weight, step),
          cuda::shuffle_xor(sums.pairs, step), cuda::shuffle_xor(sums.shift, step)};
}

namespace cuda {

// Bits of an anchor's state.
constexpr uint8_t kRanks = 1;   // it is one of the anchors
constexpr uint8_t kFinite = 2;  // so is every value of it

// Kernels that fill the sums of a loss in place of the sweep's, unless the device finds that they cannot: each kernel
// reads the answer, and the host does not wait for it.
struct Shortcut {
  const unsigned* closed;  // [1] not 0: they cannot; null: there is none
  int64_t splits;          // of the bank, that they fill

  __device__ __forceinline__ bool is_taken() const { return closed != nullptr && *closed == 0; }
};

template <typename T>
struct PartialLoss {
  int64_t splits, slots;
  T* grad;            // [splits, slots, B, D] sum of weight * bank row, or null
  RowSums* sums;      // [splits, slots, B]
  T* scale;           // [splits, slots, B] what grad is multiplied by, without the average over anchors
  RowSums* total;     // [kSlots, B] over the splits
  RowResult* result;  // [B] of the anchors that rank
  unsigned* ticket;   // [1] 0 where a pass begins
  T* average;         // [kSlots]
  T* given;           // [B] to the next pass; null in the first of a sweep
  uint8_t* state;     // [B]
  Shortcut shortcut;

  // The splits that have sums.
  __device__ __forceinline__ int64_t filled() const { return shortcut.is_taken() ? shortcut.splits : splits; }

  // All but the gradient.
  static PartialLoss carve(Carver& carve, int64_t splits, int64_t slots, int64_t B) {
    PartialLoss partial;
    partial.splits = splits;
    partial.slots = slots;
    partial.grad = nullptr;
    partial.sums = carve.take<RowSums>(splits * slots * B);
    partial.scale = carve.take<T>(splits * slots * B);
    partial.total = carve.take<RowSums>(kSlots * B);
    partial.result = carve.take<RowResult>(B);
    partial.ticket = carve.take<unsigned>(1);
    partial.average = carve.take<T>(kSlots);
    partial.given = carve.take<T>(B);
    partial.state = carve.take<uint8_t>(B);
    partial.shortcut = {};
    return partial;
  }
};

// Whether a slot of such pairs, which has some, takes positives, or negatives.
__device__ __forceinline__ bool takes(Pairs pairs, bool positive) {
  return pairs == Pairs::all || positive == (pairs == Pairs::positives);
}

// An anchor as pairs see it.
template <typename T>
struct Anchor {
  int64_t label;
  int64_t exclude;  // rows with this id it is not paired with, or kAnchorWithoutId
  T given;
  uint8_t state;

  __device__ __forceinline__ bool pairs_with(int64_t id, bool positive, Pairs pairs) const {
    return (state & kRanks) && exclude != id && takes(pairs, positive);
  }
};

template <typename T>
__device__ __forceinline__ int64_t excluded_id(const RankParams<T>& p, int64_t i) {
  return p.exclude != nullptr && is_id(p.exclude[i]) ? p.exclude[i] : kAnchorWithoutId;
}

__device__ __forceinline__ int64_t row_id(const int64_t* bank_ids, int64_t j) {
  if (bank_ids == nullptr) return j;
  return is_id(bank_ids[j]) ? bank_ids[j] : kRowWithoutId;
}

// The state of anchor i, by a full warp.
template <typename T>
__device__ __forceinline__ uint8_t anchor_state(const RankParams<T>& p, int64_t i) {
  const bool ranks = is_marked(p.anchors, i);
  return static_cast<uint8_t>((ranks ? kRanks : 0) | (warp_row_is_finite(p.z + i * p.D, p.D) ? kFinite : 0));
}

// The better of two extremes, the first row of equals.
template <typename T>
struct Extreme {
  T x;
  int64_t row;  // -1: none

  __device__ __forceinline__ void take(const Extreme& other) {
    if (other.row >= 0 && (exceeds(other.x, x) || (other.x == x && other.row < row))) *this = other;
  }
};

template <typename T>
__device__ __forceinline__ Extreme<T> shuffle_xor(Extreme<T> value, int step) {
  return {shuffle_xor(value.x, step), shuffle_xor(value.row, step)};
}

struct AddExponents {
  __device__ __forceinline__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return add(Formula::exponent, a, b);
  }
};

struct Better {
  template <typename T>
  __device__ __forceinline__ Extreme<T> operator()(Extreme<T> a, Extreme<T> b) const {
    a.take(b);
    return a;
  }
};

template <int kThreads, int kCount, typename T>
using BlockExtremes = BlockReduction<kThreads, kCount, Extreme<T>, Better>;

// What an anchor adds to the loss, as another block has just written it; without the factors.
__device__ __forceinline__ RowResult latest(const RowResult& written) {
  RowResult result;
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
    result.value[k] = __ldcg(&written.value[k]), result.count[k] = __ldcg(&written.count[k]);
  result.positives = __ldcg(&written.positives), result.negatives = __ldcg(&written.negatives);
  return result;
}

// The sums over all anchors that rank, by their `result`s: in order, by all threads of a block; its first has them.
template <int kThreads, typename Ranks>
__device__ __forceinline__ LossSum sum_of_anchors(const RowResult* results, int64_t B, const Ranks& ranks) {
  constexpr int kInFlight = 4;  // anchors that a thread reads before it adds up the first
  LossSum sum;
  for (int64_t first = threadIdx.x; first < B; first += kInFlight * kThreads) {
    bool counts[kInFlight] = {};
    RowResult result[kInFlight];
#pragma unroll
    for (int q = 0; q < kInFlight; ++q) {
      const int64_t i = first + q * kThreads;
      if (i >= B) continue;
      counts[q] = ranks(i);
      result[q] = latest(results[i]);
    }
#pragma unroll
    for (int q = 0; q < kInFlight; ++q)
      if (counts[q]) sum.add(result[q]);
  }
  static_assert(kSlots == 2);
  const BlockSums<kThreads, 7> all(
      {sum.value[0], sum.value[1], sum.count[0], sum.count[1], sum.anchors, sum.positives, sum.negatives});
  return {{all[0], all[1]}, {all[2], all[3]}, all[4], all[5], all[6]};
}

// The sum in common, from the anchors' parts [B], which other blocks have just written: by all threads of a block; all
// have it.
template <int kThreads>
__device__ __forceinline__ RowSums sum_in_common(const RowSums* parts, int64_t B) {
  RowSums sum = no_sums(Formula::exponent);
  for (int64_t i = threadIdx.x; i < B; i += kThreads)
    sum = add(Formula::exponent, sum,
              {__ldcg(&parts[i].value), __ldcg(&parts[i].weight), __ldcg(&parts[i].pairs), __ldcg(&parts[i].shift)});
  return BlockReduction<kThreads, 1, RowSums, AddExponents>({sum})[0];
}

// Of a bank row as it is ranked, before it is divided by row_length.
template <typename T, typename S>
__device__ __forceinline__ T row_value(const MemoryLossParams<T, S>& p, int64_t row, int64_t d) {
  const T u = as<T>(p.bank[row * p.D + d]);
  return p.scale == nullptr ? u : static_cast<T>(p.scale[d]) * u + static_cast<T>(p.shift[d]);
}

// By a full warp.
template <typename T, typename S>
__device__ __forceinline__ T row_length(const MemoryLossParams<T, S>& p, int64_t row) {
  if (!p.renormalize) return 1;
  T square = 0;
  for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) square += row_value(p, row, d) * row_value(p, row, d);
  for (int step = 1; step < kWarp; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
  const T norm = std::sqrt(square), eps = static_cast<T>(p.eps);
  return length(norm, eps);
}

// After pass k of the program: what each anchor is given for the next one; or, after the last, loss [1] and grad_z
// [B, D]. In settle.cu.
template <typename T, typename S>
int launch_settle(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Program& program, int k,
                  const PartialLoss<T>& partial, const Gpu& gpu);

}  // namespace cuda
}  // namespace xbn
