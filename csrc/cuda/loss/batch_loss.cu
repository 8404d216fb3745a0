// batch_loss: the loss of B anchors against the other rows of their own batch, from the products of all with all.
//
//   in     dots [B, B] = z z^T, labels [B], ids [B] or null
//   out    loss [1], grad_dots [B, B]
//   math   s_ij = dots_ij / max(|z_j|, eps) if renormalize, and |z_j|^2 is dots_jj, which belongs to no pair. The rest is as
//          in sweep.cu, except that the rows carry a gradient, too. It is in dots_jj:
//          dL/ddots_ij = g_ij / |z_j|,  dL/ddots_jj = -sum_i g_ij dots_ij / (2 |z_j|^3),  g = dL/ds
//   grid   batch_norms_kernel: a thread to a row. batch_rank_kernel, or batch_triplets_kernel: a block to an anchor, which
//          reads its pairs once per pass of the loss, then once more for their weights; the block that finishes
//          last adds up the anchors. batch_settle_kernel: a block to 32 columns
//   keeps  norms [B], results [B]; of all triplets also the list of each anchor's positives [B, B]
//   needs  any GPU; float and double
//   order  fixed by the shapes: the same bits every run
#include "anchor.cuh"

#include "../../math/ranks.h"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;  // of a block, side by side; below each other the threads take every eighth row
constexpr int kBelow = kThreads / kColumns;

template <typename T>
struct Workspace {
  Workspace(void* memory, int64_t B, bool triplets) {
    Carver carve(memory);
    norm = carve.take<T>(B);
    inverse_norm = carve.take<T>(B);
    result = carve.take<RowResult>(B);
    average = carve.take<T>(kSlots);
    ticket = carve.take<unsigned>(1);
    positives = triplets ? carve.take<int>(B * B) : nullptr;
    bytes = carve.bytes();
  }

  T *norm, *inverse_norm;  // [B]
  RowResult* result;       // [B]
  T* average;              // [kSlots]
  unsigned* ticket;        // [1]
  int* positives;          // [B, B]
  int64_t bytes;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) batch_norms_kernel(const BatchLossParams<T> p, const Workspace<T> w) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j == 0) *w.ticket = 0;
  if (j >= p.B) return;
  const T norm = p.renormalize ? std::sqrt(p.dots[j * p.B + j]) : T(1), eps = static_cast<T>(p.eps);
  w.norm[j] = norm;
  w.inverse_norm[j] = p.renormalize ? T(1) / (norm < eps ? eps : norm) : T(1);
}

// The pairs of anchor i = blockIdx.x; a thread takes every kThreads'th.
template <typename T>
struct AnchorPairs {
  __device__ __forceinline__ AnchorPairs(const BatchLossParams<T>& p, const Workspace<T>& w)
      : i(blockIdx.x), B(p.B), dots(p.dots + i * p.B), inverse_norm(w.inverse_norm), labels(p.labels), ids(p.ids) {
    exists = i < B;
    ranks = exists && (p.anchors == nullptr || p.anchors[i]);
    finite = exists && is_finite(dots[i]);
    label = exists ? labels[i] : 0;
    id = exists && ids != nullptr ? ids[i] : -1;
  }

  __device__ __forceinline__ T similarity(int64_t j) const {
    return finite ? dots[j] * inverse_norm[j] : static_cast<T>(NAN);
  }
  __device__ __forceinline__ bool positive(int64_t j) const { return labels[j] == label; }
  __device__ __forceinline__ bool on(int64_t j, Pairs pairs) const {
    const bool excluded = j == i || (id >= 0 && ids[j] == id);
    return !excluded && (pairs == Pairs::all || positive(j) == (pairs == Pairs::positives));
  }

  // f(row, similarity, whether positive, whether the slot has the pair)
  template <typename F>
  __device__ __forceinline__ void each(Pairs pairs, const F& f) const {
    for (int64_t j = threadIdx.x; j < B; j += kThreads) f(j, similarity(j), positive(j), on(j, pairs));
  }

  int64_t i, B;
  const T *dots, *inverse_norm;
  const int64_t *labels, *ids;
  bool exists, ranks, finite;
  int64_t label, id;
};

// A slot's sums, and what its weights are made from once the anchor's factors are known.
template <typename T>
struct Scored {
  Slot slot;
  T given;
  RowSums sums;
};

// The sums of a slot; in thread 0.
template <typename T>
__device__ __forceinline__ RowSums score(const AnchorPairs<T>& c, const Slot& slot, T given) {
  if (slot.formula == Formula::extreme) {
    Extreme<T> best = {static_cast<T>(-INFINITY), -1};
    int pairs = 0;
    c.each(slot.pairs, [&](int64_t j, T s, bool positive, bool on) {
      if (on) best.take({positive ? -s : s, j});
      pairs += on;
    });
    best = BlockExtremes<kThreads, 1, T>({best})[0];
    const BlockSums<kThreads, 1> all({static_cast<double>(pairs)});
    return {static_cast<double>(best.row), 0, all[0], static_cast<double>(best.x)};
  }
  T value = 0, weight = 0, top = 0;
  int pairs = 0;
  with_formula<T>(slot, [&](const auto& formula) {
    if constexpr (std::decay_t<decltype(formula)>::kExponential) {
      top = static_cast<T>(-INFINITY);
      c.each(slot.pairs, [&](int64_t, T s, bool positive, bool on) {
        const Exponent<T> e = formula(s, positive, given);
        if (on && e.counts && e.x > top) top = e.x;
      });
      top = BlockTops<kThreads, 1, T>({top})[0];
      c.each(slot.pairs, [&](int64_t, T s, bool positive, bool on) {
        const Exponent<T> e = formula(s, positive, given);
        const bool counts = on && e.counts;
        value += counts ? exp_of_negative(e.x - top) : T(0);
        pairs += counts;
      });
    } else {
      c.each(slot.pairs, [&](int64_t, T s, bool positive, bool on) {
        const Score<T> score = formula(s, positive, given);
        value += on ? score.value : T(0);
        weight += on ? score.weight : T(0);
        pairs += on && score.counts;
      });
    }
  });
  const BlockSums<kThreads, 3> sums(
      {static_cast<double>(value), static_cast<double>(weight), static_cast<double>(pairs)});
  return {sums[0], sums[1], sums[2], static_cast<double>(top)};
}

// What a pair that the slot has adds to the gradient, without the factor.
template <typename T>
__device__ __forceinline__ T weight_of(const Scored<T>& scored, int64_t j, T s, bool positive) {
  if (scored.slot.formula == Formula::extreme) return static_cast<double>(j) == scored.sums.value ? T(1) : T(0);
  T weight = 0;
  with_formula<T>(scored.slot, [&](const auto& formula) {
    if constexpr (std::decay_t<decltype(formula)>::kExponential) {
      const Exponent<T> e = formula(s, positive, scored.given);
      if (e.counts) weight = e.slope * exp_of_negative(e.x - static_cast<T>(scored.sums.shift));
    } else {
      weight = formula(s, positive, scored.given).weight;
    }
  });
  return weight;
}

// After every anchor's result: in the block that comes last, the loss.
template <typename T>
__device__ __forceinline__ void add_up(const BatchLossParams<T>& p, const Workspace<T>& w) {
  __shared__ bool last;
  if (!is_last_block(w.ticket, gridDim.x, &last)) return;
  double value[kSlots] = {}, count[kSlots] = {}, all = 0;
  for (int64_t i = threadIdx.x; i < p.B; i += kThreads) {
    if (p.anchors != nullptr && !p.anchors[i]) continue;
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      value[k] += __ldcg(&w.result[i].value[k]), count[k] += __ldcg(&w.result[i].count[k]);
  }
  static_assert(kSlots == 2);
  const BlockSums<kThreads, 4> sums({value[0], value[1], count[0], count[1]});
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const double average = 1.0 / std::fmax(1.0, sums[kSlots + k]);
    all += average * sums[k];
    w.average[k] = static_cast<T>(average);
  }
  *p.loss = static_cast<T>(all);
}

// The gradient of an anchor that does not rank is zero, of one that is not finite NaN.
template <typename T>
__device__ __forceinline__ bool has_weights(const BatchLossParams<T>& p, const AnchorPairs<T>& c) {
  if (p.grad_dots == nullptr || !c.exists) return false;
  if (c.ranks && c.finite) return true;
  for (int64_t j = threadIdx.x; j < p.B; j += kThreads)
    p.grad_dots[c.i * p.B + j] = c.finite ? T(0) : static_cast<T>(NAN);
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    batch_rank_kernel(const BatchLossParams<T> p, const LossSpec loss, const Program program, const Workspace<T> w) {
  __shared__ Program passes;  // there it can be indexed at run time
  __shared__ Scored<T> scored[kSlots];
  __shared__ RowResult result;
  const AnchorPairs<T> c(p, w);
  if (threadIdx.x == 0) {
    passes = program;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) scored[k] = {{}, T(0), {}};
  }
  __syncthreads();
  if (c.ranks) {
#pragma unroll 1
    for (int pass = 0; pass < passes.passes; ++pass) {
      T given = 0;
      if (pass > 0) {
        const RowSums sums[kSlots] = {scored[0].sums, scored[1].sums};
        given = static_cast<T>(given_for(loss, pass, sums));
      }
      __syncthreads();  // all know what they are given
#pragma unroll 1
      for (int k = 0; k < kSlots; ++k) {
        const Slot slot = passes.pass[pass].slot[k];
        if (slot.pairs == Pairs::none) continue;
        const RowSums sums = score(c, slot, given);
        if (threadIdx.x == 0) scored[k] = {slot, given, sums};
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      const RowSums sums[kSlots] = {scored[0].sums, scored[1].sums};
      result = finish(loss, sums);
      w.result[c.i] = result;
    }
    __syncthreads();
  }
  if (has_weights(p, c)) {
    const T factor[kSlots] = {static_cast<T>(result.factor[0]), static_cast<T>(result.factor[1])};
    c.each(Pairs::all, [&](int64_t j, T s, bool positive, bool) {
      T grad = 0;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        if (scored[k].slot.pairs == Pairs::none || !c.on(j, scored[k].slot.pairs)) continue;
        grad += factor[k] * weight_of(scored[k], j, s, positive);  // if a similarity is NaN, the factor is
      }
      p.grad_dots[c.i * p.B + j] = grad;
    });
  }
  add_up(p, w);
}

// All triplets: every negative is compared with every positive. See ranks.h.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    batch_triplets_kernel(const BatchLossParams<T> p, const LossSpec loss, const Workspace<T> w) {
  __shared__ int listed;
  const AnchorPairs<T> c(p, w);
  int* positives = w.positives + c.i * p.B;
  if (c.ranks && threadIdx.x < kWarp) {
    int n = 0;
    for (int64_t begin = 0; begin < p.B; begin += kWarp) {
      const int64_t j = begin + threadIdx.x;
      const unsigned lanes = __ballot_sync(0xffffffffu, j < p.B && c.on(j, Pairs::positives));
      if (lanes >> threadIdx.x & 1u) positives[n + __popc(lanes & ((1u << threadIdx.x) - 1u))] = static_cast<int>(j);
      n += __popc(lanes);
    }
    if (threadIdx.x == 0) listed = n;
  }
  __syncthreads();
  const bool weighs = has_weights(p, c);
  const T margin = static_cast<T>(loss.a);
  if (c.ranks) {
    double value = 0, triplets = 0;
    c.each(Pairs::negatives, [&](int64_t j, T s, bool, bool on) {
      const T x = s + margin;
      int rank = 0;
      for (int r = 0; on && r < listed; ++r) {
        const T threshold = c.similarity(positives[r]);
        if (!is_below(threshold, x)) continue;
        rank += 1;
        value += static_cast<double>(x) - static_cast<double>(threshold);
      }
      triplets += rank;
      if (weighs && !c.on(j, Pairs::positives)) p.grad_dots[c.i * p.B + j] = static_cast<T>(rank);
    });
    for (int r = threadIdx.x; weighs && r < listed; r += kThreads) {
      const T threshold = c.similarity(positives[r]);
      int above = 0;
      for (int64_t j = 0; j < p.B; ++j)
        above += c.on(j, Pairs::negatives) && is_below(threshold, c.similarity(j) + margin);
      p.grad_dots[c.i * p.B + positives[r]] = static_cast<T>(-above);
    }
    const BlockSums<kThreads, 2> all({value, triplets});
    const RowSums sums[kSlots] = {{all[0], 0, all[1], 0}, {}};
    if (threadIdx.x == 0) w.result[c.i] = finish(LossSpec{LossKind::triplet_all}, sums);
  }
  add_up(p, w);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    batch_settle_kernel(const BatchLossParams<T> p, const LossSpec loss, const Workspace<T> w) {
  __shared__ T sums[kThreads];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const T average[kSlots] = {w.average[group_of(loss, 0)], w.average[group_of(loss, 1)]};
  T sum = 0;
  if (j < p.B) {
    const int64_t label = p.labels[j];
    const T inverse = w.inverse_norm[j];
#pragma unroll 4
    for (int64_t i = threadIdx.x / kColumns; i < p.B; i += kBelow) {
      const T g = p.grad_dots[i * p.B + j] * (p.labels[i] == label ? average[1] : average[0]);
      sum += g * p.dots[i * p.B + j];
      p.grad_dots[i * p.B + j] = g * inverse;
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kColumns || j >= p.B || !p.renormalize || w.norm[j] < static_cast<T>(p.eps)) return;
  for (int k = 1; k < kBelow; ++k) sum += sums[k * kColumns + threadIdx.x];
  const T inverse = w.inverse_norm[j];
  p.grad_dots[j * p.B + j] = T(-0.5) * inverse * inverse * inverse * sum;
}

}  // namespace

template <typename T>
int batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Gpu& gpu) {
  const auto w = make_workspace<Workspace<T>>(gpu, p.B, goes_in_rounds(loss));
  const auto blocks = [](int64_t n) { return dim3(static_cast<unsigned>(larger(1, n))); };
  int error = run(batch_norms_kernel<T>, blocks(ceil_div(p.B, kThreads)), kThreads, gpu, p, w);
  if (error != cudaSuccess) return error;
  error = goes_in_rounds(loss) ? run(batch_triplets_kernel<T>, blocks(p.B), kThreads, gpu, p, loss, w)
                               : run(batch_rank_kernel<T>, blocks(p.B), kThreads, gpu, p, loss, make_program(loss), w);
  if (error != cudaSuccess || p.grad_dots == nullptr || p.B == 0) return error;
  return run(batch_settle_kernel<T>, blocks(ceil_div(p.B, kColumns)), kThreads, gpu, p, loss, w);
}

template int batch_loss(const BatchLossParams<float>&, const LossSpec&, const Gpu&);
template int batch_loss(const BatchLossParams<double>&, const LossSpec&, const Gpu&);

}  // namespace xbn::cuda
