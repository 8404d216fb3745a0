// batch_loss: the loss of B anchors against the other rows of their own batch, from the products of all with all.
// batch_sums: what some of them, A from row `first` on, add to it.
//
//   in     dots [B, B] = z z^T, labels [B], ids [B] or null;  of batch_sums dots [A, B]
//   out    loss [1], grad_dots [B, B];  totals [7], grad_dots [A, B]
//   math   s_ij = dots_ij / max(|z_j|, eps) if renormalize, and |z_j|^2 is dots_jj, which belongs to no pair. The rest
//          is as in sweep.cu, except that the rows carry a gradient, too. It is in dots_jj:
//          dL/ddots_ij = g_ij / |z_j|,  dL/ddots_jj = -sum_i g_ij dots_ij / (2 |z_j|^3),  g = dL/ds
//          batch_sums has s_ij = dots_ij, and g up to the averages, which are those of all anchors
//   grid   batch_norms_kernel: a thread to a row. batch_common_kernel, of a loss that gives in common: as the next,
//          without weights. batch_rank_kernel, or batch_triplets_kernel: a block to an anchor,
//          which reads its pairs once for every slot of the loss, twice for exponents (score_block.cuh), then once more
//          for their weights; the block that finishes last adds up the anchors. batch_settle_kernel, not of batch_sums:
//          a block to 32 columns
//   keeps  norms [B], results [A]; of all triplets also the list of each anchor's positives [A, B]
//   needs  any GPU; float and double
//   order  fixed by the shapes: the same bits every run
#include "score_block.cuh"

#include "../../math/ranks.h"

namespace xbn::cuda {
namespace {

constexpr int kColumns = 32;  // of a block, side by side; below each other the threads take every eighth row
constexpr int kBelow = kBlockThreads / kColumns;

template <typename T>
struct BatchWorkspace {
  BatchWorkspace(void* memory, int64_t A, int64_t B, bool triplets, bool common) {
    Carver carve(memory);
    norm = carve.take<T>(B);
    inverse_norm = carve.take<T>(B);
    result = carve.take<RowResult>(A);
    average = carve.take<T>(kSlots);
    ticket = carve.take<unsigned>(2);
    parts = common ? carve.take<RowSums>(A) : nullptr;
    given = carve.take<T>(1);
    positives = triplets ? carve.take<int>(A * B) : nullptr;
    bytes = carve.bytes();
  }

  T *norm, *inverse_norm;  // [B]
  RowResult* result;       // [A]
  T* average;              // [kSlots]
  unsigned* ticket;        // [2]
  RowSums* parts;          // [A] what each adds to the sum in common
  T* given;                // [1] to all anchors for the second pass
  int* positives;          // [A, B]
  int64_t bytes;
};

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norms_kernel(const BatchLossParams<T> p, const BatchWorkspace<T> w) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (j == 0) w.ticket[0] = w.ticket[1] = 0;
  if (j >= p.B) return;
  const T norm = p.renormalize ? std::sqrt(p.dots[j * p.B + j]) : T(1), eps = static_cast<T>(p.eps);
  w.norm[j] = norm;
  w.inverse_norm[j] = p.renormalize ? inverse_length(norm, eps) : T(1);
}

// The pairs of anchor i = blockIdx.x, which is a row of the batch: score_block.cuh says what is asked of them. Where
// there is no such anchor it does not rank.
template <typename T>
struct BatchPairs {
  static constexpr int kAnchors = 1;

  Anchor<T> anchors[kAnchors];
  int64_t i, own, columns;
  const T *dots, *inverse_norm;
  const int64_t *labels, *ids;

  __device__ __forceinline__ BatchPairs(const BatchLossParams<T>& p, const BatchWorkspace<T>& w)
      : i(blockIdx.x),
        own(p.first + i),
        columns(p.B),
        dots(p.dots + i * p.B),
        inverse_norm(w.inverse_norm),
        labels(p.labels),
        ids(p.ids) {
    anchors[0] = {0, kAnchorWithoutId, T(0), 0};
    if (i >= p.A) return;
    const bool ranks = is_marked(p.anchors, i);
    anchors[0].label = labels[own];
    anchors[0].exclude = id(own);
    anchors[0].state = static_cast<uint8_t>((ranks ? kRanks : 0) | (is_finite(dots[own]) ? kFinite : 0));
  }

  __device__ __forceinline__ bool ranks() const { return anchors[0].state & kRanks; }
  __device__ __forceinline__ bool finite() const { return anchors[0].state & kFinite; }

  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ bool exists(int64_t) const { return true; }
  __device__ __forceinline__ int64_t row(int64_t j) const { return j; }
  __device__ __forceinline__ int64_t label(int64_t j) const { return labels[j]; }
  // That of its sample, or one that no other row has: so no row is paired with itself.
  __device__ __forceinline__ int64_t id(int64_t j) const { return stored_id(ids, j, j); }
  __device__ __forceinline__ T similarity(int, int64_t j) const {
    return finite() ? dots[j] * inverse_norm[j] : static_cast<T>(NAN);
  }
};

// After every anchor's result: in the block that comes last, their totals or, without these, the loss.
template <typename T>
__device__ __forceinline__ void finish_batch(const BatchLossParams<T>& p, const BatchWorkspace<T>& w) {
  __shared__ bool last;
  if (!is_last_block(w.ticket, gridDim.x, &last)) return;
  const LossSum sum = sum_of_anchors<kBlockThreads>(w.result, p.A, [&](int64_t i) { return is_marked(p.anchors, i); });
  if (threadIdx.x != 0) return;
  if (p.totals != nullptr) return sum.store(p.totals);
#pragma unroll
  for (int k = 0; k < kSlots; ++k) w.average[k] = static_cast<T>(sum.average(k));
  *p.loss = static_cast<T>(sum.loss());
}

// The first pass by itself, where all anchors are given the same for the second.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_common_kernel(const BatchLossParams<T> p, const Pass pass, const BatchWorkspace<T> w) {
  __shared__ bool last;
  __shared__ RowSums sums[kSlots];
  const BatchPairs<T> block(p, w);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) sums[k] = no_sums(pass.slot[k].formula);
  }
  __syncthreads();
  if (block.ranks()) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) score_pairs<T>(block, pass.slot[k], sums + k, NoWeights());
  }
  if (threadIdx.x == 0 && block.i < p.A) w.parts[block.i] = part_in_common(sums);
  if (!is_last_block(w.ticket + 1, gridDim.x, &last)) return;
  const RowSums common = sum_in_common<kBlockThreads>(w.parts, p.A);
  if (threadIdx.x == 0) *w.given = static_cast<T>(mean_in_common(common));
}

// The gradient of an anchor that does not rank is zero, of one that is not finite NaN.
template <typename T>
__device__ __forceinline__ bool has_weights(const BatchLossParams<T>& p, const BatchPairs<T>& block) {
  if (p.grad_dots == nullptr || block.i >= p.A) return false;
  if (block.ranks() && block.finite()) return true;
  for (int64_t j = threadIdx.x; j < p.B; j += kBlockThreads)
    p.grad_dots[block.i * p.B + j] = block.finite() ? T(0) : static_cast<T>(NAN);
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_rank_kernel(const BatchLossParams<T> p, const LossSpec loss, const Program program,
                      const BatchWorkspace<T> w) {
  __shared__ Program passes;       // there it can be indexed at run time
  __shared__ Slot filled[kSlots];  // by the passes so far
  __shared__ T given[kSlots];      // when they were
  __shared__ RowSums sums[kSlots];
  __shared__ RowResult result;
  BatchPairs<T> block(p, w);
  if (threadIdx.x == 0) {
    passes = program;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) filled[k] = {}, sums[k] = {};
  }
  __syncthreads();
  if (block.ranks()) {
#pragma unroll 1
    for (int pass = 0; pass < passes.passes; ++pass) {
      const Slot(&slots)[kSlots] = passes.pass[pass].slot;
      if (threadIdx.x == 0) {  // the sums are its own
        const double common = gives_in_common(loss) ? *w.given : 0;
        const T of_pass = pass > 0 ? static_cast<T>(given_for(loss, pass, sums, common)) : T(0);
#pragma unroll 1
        for (int k = 0; k < kSlots; ++k)
          if (slots[k].pairs != Pairs::none)
            filled[k] = slots[k], given[k] = of_pass, sums[k] = no_sums(slots[k].formula);
      }
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < kSlots; ++k) {
        if (slots[k].pairs == Pairs::none) continue;
        block.anchors[0].given = given[k];
        score_pairs<T>(block, slots[k], sums + k, NoWeights());
      }
    }
    if (threadIdx.x == 0) {
      result = finish(loss, sums);
      w.result[block.i] = result;
    }
    __syncthreads();
  }
  if (has_weights(p, block)) {
    const T factor[kSlots] = {static_cast<T>(result.factor[0]), static_cast<T>(result.factor[1])};
    each_pair(block, Pairs::all, [&](int, int64_t j, T s, bool positive, bool on) {
      T grad = 0;  // if a similarity is NaN, the factors are
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        if (on && filled[k].pairs != Pairs::none && takes(filled[k].pairs, positive))
          grad += factor[k] * weight_of(filled[k], sums[k], given[k], j, s, positive);
      p.grad_dots[block.i * p.B + j] = grad;
    });
  }
  finish_batch(p, w);
}

// All triplets: every negative is compared with every positive. See ranks.h.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_triplets_kernel(const BatchLossParams<T> p, const LossSpec loss, const BatchWorkspace<T> w) {
  __shared__ int listed;
  const BatchPairs<T> block(p, w);
  int* positives = w.positives + block.i * p.B;
  if (block.ranks() && threadIdx.x < kWarp) {
    int n = 0;
    for (int64_t begin = 0; begin < p.B; begin += kWarp) {
      const int64_t j = begin + threadIdx.x;
      const unsigned lanes = __ballot_sync(0xffffffffu, j < p.B && has_pair(block, j, Pairs::positives));
      if (lanes >> threadIdx.x & 1u) positives[n + __popc(lanes & ((1u << threadIdx.x) - 1u))] = static_cast<int>(j);
      n += __popc(lanes);
    }
    if (threadIdx.x == 0) listed = n;
  }
  __syncthreads();
  const bool weighs = has_weights(p, block);
  const T margin = static_cast<T>(loss.a), scale = static_cast<T>(loss.scale);
  if (block.ranks()) {
    double value = 0, triplets = 0, active_negatives = 0, active_positives = 0;
    each_pair(block, Pairs::negatives, [&](int, int64_t j, T s, bool, bool on) {
      const T x = s + margin;
      int rank = 0;
      for (int r = 0; on && r < listed; ++r) {
        const T threshold = block.similarity(0, positives[r]);
        if (!is_below(threshold, x)) continue;
        rank += 1;
        value += static_cast<double>(x) - static_cast<double>(threshold);
      }
      triplets += rank, active_negatives += rank > 0;
      if (weighs && !has_pair(block, j, Pairs::positives))
        p.grad_dots[block.i * p.B + j] = scale * static_cast<T>(rank);
    });
    for (int r = threadIdx.x; (weighs || p.totals != nullptr) && r < listed; r += kBlockThreads) {
      const T threshold = block.similarity(0, positives[r]);
      int above = 0;
      for (int64_t j = 0; j < p.B; ++j)
        above += has_pair(block, j, Pairs::negatives) && is_below(threshold, block.similarity(0, j) + margin);
      active_positives += above > 0;
      if (weighs) p.grad_dots[block.i * p.B + positives[r]] = scale * static_cast<T>(-above);
    }
    const BlockSums<kBlockThreads, 4> all({value, triplets, active_negatives, active_positives});
    const RowSums sums[kSlots] = {{all[0], all[2], all[1], 0}, {0, all[3], 0, 0}};
    LossSpec of_all = loss;
    of_all.kind = LossKind::triplet_all;  // known when this is compiled
    if (threadIdx.x == 0) w.result[block.i] = finish(of_all, sums);
  }
  finish_batch(p, w);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_settle_kernel(const BatchLossParams<T> p, const LossSpec loss, const BatchWorkspace<T> w) {
  __shared__ T sums[kBlockThreads];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const T average[kSlots] = {w.average[group_of(loss, 0)], w.average[group_of(loss, 1)]};
  T sum = 0;
  if (j < p.B) {
    const int64_t label = p.labels[j];
    const T inverse = w.inverse_norm[j];
#pragma unroll 4
    for (int64_t i = threadIdx.x / kColumns; i < p.B; i += kBelow) {
      const T g = p.grad_dots[i * p.B + j] * (p.labels[i] == label ? average[1] : average[0]) * inverse;
      sum += g * p.dots[i * p.B + j];
      p.grad_dots[i * p.B + j] = g;
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kColumns || j >= p.B || !p.renormalize || w.norm[j] < static_cast<T>(p.eps)) return;
  for (int k = 1; k < kBelow; ++k) sum += sums[k * kColumns + threadIdx.x];
  const T inverse = w.inverse_norm[j];
  p.grad_dots[j * p.B + j] = sum * inverse * (T(-0.5) * inverse);  // a factor at a time, or it overflows
}

dim3 blocks(int64_t n) { return dim3(static_cast<unsigned>(larger(1, n))); }

// The anchors' results, what they add up to and, up to the averages, the derivative by their similarities.
template <typename T>
int rank_batch(const BatchLossParams<T>& p, const LossSpec& loss, const BatchWorkspace<T>& w, const Gpu& gpu) {
  int error = run(batch_norms_kernel<T>, blocks(ceil_div(p.B, kBlockThreads)), kBlockThreads, gpu, p, w);
  if (error != cudaSuccess) return error;
  if (goes_in_rounds(loss)) return run(batch_triplets_kernel<T>, blocks(p.A), kBlockThreads, gpu, p, loss, w);
  const Program program = make_program(loss);
  if (gives_in_common(loss)) {
    error = run(batch_common_kernel<T>, blocks(p.A), kBlockThreads, gpu, p, program.pass[0], w);
    if (error != cudaSuccess) return error;
  }
  return run(batch_rank_kernel<T>, blocks(p.A), kBlockThreads, gpu, p, loss, program, w);
}

}  // namespace

template <typename T>
int batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Gpu& gpu) {
  const auto w = make_workspace<BatchWorkspace<T>>(gpu, p.A, p.B, goes_in_rounds(loss), gives_in_common(loss));
  const int error = rank_batch(p, loss, w, gpu);
  if (error != cudaSuccess || p.grad_dots == nullptr || p.B == 0) return error;
  return run(batch_settle_kernel<T>, blocks(ceil_div(p.B, kColumns)), kBlockThreads, gpu, p, loss, w);
}

template <typename T>
int batch_sums(const BatchSumsParams<T>& p, const LossSpec& loss, const Gpu& gpu) {
  const auto w = make_workspace<BatchWorkspace<T>>(gpu, p.A, p.B, goes_in_rounds(loss), gives_in_common(loss));
  return rank_batch(BatchLossParams<T>{p, false, 1, nullptr}, loss, w, gpu);
}

template int batch_loss(const BatchLossParams<float>&, const LossSpec&, const Gpu&);
template int batch_loss(const BatchLossParams<double>&, const LossSpec&, const Gpu&);
template int batch_sums(const BatchSumsParams<float>&, const LossSpec&, const Gpu&);
template int batch_sums(const BatchSumsParams<double>&, const LossSpec&, const Gpu&);

}  // namespace xbn::cuda
