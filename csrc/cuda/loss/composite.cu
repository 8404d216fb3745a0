// memory_loss as two library products per chunk of the bank: for many anchors, for float64, for 16-bit banks and for
// D > 1024. These are the kernels around the products; kernels.h has the order of the calls.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null; rows [0, count) count
//   out    loss [1], grad_z [B, D], pairs [2]
//   math   as sweep.cu, a chunk of the bank at a time: rows r_j, similarities s = z r^T, weights, grad += weights r
//   grid   begin_kernel: a warp to an anchor;  rows_kernel: a warp to a bank row;  score_kernel: a block to 4 anchors
//   keeps  one chunk of rows [chunk, D] and similarities [slots * B, chunk], small enough for a second-level cache, and
//          the gradient [slots * B, D]. A small B x M may be one chunk; of a large one it is 24 MB, or 256 rows.
//   needs  all M rows are processed whatever the count, since the number of products is decided before the count is
//          known; rows beyond it count for nothing
//   order  chunks one after the other; a block adds to the sums of its anchors alone: the same bits every run, as far
//          as the library's products are
#include "anchor.cuh"
#include "triplets.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAnchors = 4;  // that a block scores at a time, for one reading of the bank's labels

template <typename T>
struct Workspace {
  T* map;      // [2, D] scale and shift in T
  T* rescale;  // [kSlots, B] of the gradient so far, as exponents have grown
  PartialLoss<T> partial;
  Thresholds<T> thresholds;
  int64_t bytes;

  Workspace(void* memory, int64_t B, int64_t D, const Composite<T>& c) {
    Carver carve(memory);
    map = carve.take<T>(2 * D);
    rescale = carve.take<T>(kSlots * B);
    partial = PartialLoss<T>::carve(carve, 1, c.slots, B);
    partial.grad = c.grad;
    thresholds = Thresholds<T>::carve(carve, B, c.thresholds);
    bytes = carve.bytes();
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    begin_kernel(const MemoryLossParams<T, T> p, const Pass pass, bool first, const Workspace<T> w) {
  const int64_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = gridDim.x * kWarps;
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.partial.ticket = 0;
  for (int64_t i = warp; i < p.B; i += warps) {
    const uint8_t state = anchor_state(p, i);
    if (threadIdx.x % kWarp != 0) continue;
    w.partial.state[i] = state;
    if (first) w.partial.given[i] = 0;  // read by the first pass, too
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
      if (pass.slot[k].pairs != Pairs::none &&
          pass.slot[k].formula != Formula::weigh)  // that goes on with its thresholds'
        w.partial.sums[k * p.B + i] = no_sums(pass.slot[k].formula);
  }
  for (int64_t d = blockIdx.x * kThreads + threadIdx.x; d < p.D; d += gridDim.x * kThreads) {
    w.map[d] = p.scale != nullptr ? static_cast<T>(p.scale[d]) : T(1);
    w.map[p.D + d] = p.scale != nullptr ? static_cast<T>(p.shift[d]) : T(0);
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const MemoryLossParams<T, S> p, const Workspace<T> w, int64_t first, int64_t chunk, T* rows) {
  const int64_t j = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (j >= chunk) return;
  const bool exists = first + j < stored_rows(p.count, p.M);
  const S* __restrict__ u = p.bank + (first + j) * p.D;
  T* __restrict__ out = rows + j * p.D;
  const auto row = [&](int64_t d) { return exists ? w.map[d] * as<T>(u[d]) + w.map[p.D + d] : T(0); };
  T inverse = 1;
  if (p.renormalize) {
    T square = 0;
#pragma unroll 4
    for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) square += row(d) * row(d);
    for (int step = 1; step < kWarp; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    const T norm = std::sqrt(square), eps = static_cast<T>(p.eps);
    inverse = T(1) / (norm < eps ? eps : norm);
  }
#pragma unroll 4
  for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) out[d] = row(d) * inverse;  // again: it is in cache
}

// The pairs of kAnchors anchors with a chunk, as this thread takes them: one row of the bank after the other.
template <typename T>
struct ChunkPairs {
  Anchor<T> anchors[kAnchors];
  int64_t block, B;            // first anchor
  int64_t first, rows, chunk;  // bank rows [first, first + rows) exist; a chunk is longer
  const int64_t *bank_labels, *bank_ids;
  Pairs pairs;
  const T* s;  // [B, chunk]

  // f(anchor of this block, row of the chunk, similarity, whether positive, whether the slot has the pair)
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t j = threadIdx.x; j < chunk; j += kThreads) {
      const bool exists = j < rows;
      const int64_t label = exists ? bank_labels[first + j] : 0;
      const int64_t id = exists ? row_id(bank_ids, first + j) : kRowWithoutId;
#pragma unroll
      for (int a = 0; a < kAnchors; ++a) {
        if (block + a >= B) break;
        const bool positive = anchors[a].label == label;
        const bool on = exists && anchors[a].pairs_with(id, positive, pairs);
        const T similarity = (anchors[a].state & kFinite) ? s[(block + a) * chunk + j] : static_cast<T>(NAN);
        f(a, j, similarity, positive, on);
      }
    }
  }
};

// Adds what the block's threads have of each of its anchors to the anchor's sums.
template <typename T>
__device__ __forceinline__ void add_chunk(Formula formula, const T (&value)[kAnchors], const T (&weight)[kAnchors],
                                          const int (&pairs)[kAnchors], const T (&shift)[kAnchors],
                                          const ChunkPairs<T>& c, RowSums* sums) {
  double values[3 * kAnchors];
#pragma unroll
  for (int a = 0; a < kAnchors; ++a)
    values[a] = value[a], values[kAnchors + a] = weight[a], values[2 * kAnchors + a] = pairs[a];
  const BlockSums<kThreads, 3 * kAnchors> all(values);
  const int mine = static_cast<int>(threadIdx.x);  // the first threads, one to an anchor
  if (mine >= kAnchors || c.block + mine >= c.B) return;
  double shift_of_mine = 0;
#pragma unroll
  for (int a = 0; a < kAnchors; ++a)
    if (a == mine) shift_of_mine = shift[a];
  const RowSums of_chunk = {all[mine], all[kAnchors + mine], all[2 * kAnchors + mine], shift_of_mine};
  sums[c.block + mine] = add(formula, sums[c.block + mine], of_chunk);
}

// One slot of a chunk. weights [B, chunk] may be the similarities.
template <typename T>
__device__ __forceinline__ void score_chunk(const ChunkPairs<T>& c, const Slot& slot, RowSums* sums, T* rescale,
                                            T* weights) {
  T value[kAnchors] = {}, weight[kAnchors] = {}, shift[kAnchors] = {};
  int pairs[kAnchors] = {};
  if (slot.formula == Formula::extreme) {
    Extreme<T> best[kAnchors];
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) best[a] = {static_cast<T>(-INFINITY), -1};
    c.each([&](int a, int64_t j, T s, bool positive, bool on) {
      if (on) best[a].take({positive ? -s : s, c.first + j});
      pairs[a] += on;
    });
    double counts[kAnchors];
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) counts[a] = pairs[a];
    const BlockExtremes<kThreads, kAnchors, T> bests(best);
    const BlockSums<kThreads, kAnchors> all(counts);
    const int mine = static_cast<int>(threadIdx.x);
    if (mine >= kAnchors || c.block + mine >= c.B) return;
    const Extreme<T> extreme = bests[mine];
    const RowSums of_chunk = {static_cast<double>(extreme.row), 0, all[mine], static_cast<double>(extreme.x)};
    sums[c.block + mine] = add(slot.formula, sums[c.block + mine], of_chunk);
    return;
  }
  with_formula<T>(slot, [&](const auto& formula) {
    if constexpr (std::decay_t<decltype(formula)>::kExponential) {
      T before[kAnchors];
#pragma unroll
      for (int a = 0; a < kAnchors; ++a)
        before[a] = shift[a] = c.block + a < c.B ? static_cast<T>(sums[c.block + a].shift) : static_cast<T>(-INFINITY);
      c.each([&](int a, int64_t, T s, bool positive, bool on) {
        const Exponent<T> e = formula(s, positive, c.anchors[a].given);
        if (on && e.counts && e.x > shift[a]) shift[a] = e.x;
      });
      const BlockTops<kThreads, kAnchors, T> tops(shift);
#pragma unroll
      for (int a = 0; a < kAnchors; ++a) {
        shift[a] = tops[a];
        if (threadIdx.x == 0 && c.block + a < c.B)
          rescale[c.block + a] = shift[a] > before[a] ? std::exp(before[a] - shift[a]) : T(1);
      }
      c.each([&](int a, int64_t j, T s, bool positive, bool on) {
        const Exponent<T> e = formula(s, positive, c.anchors[a].given);
        const bool counts = on && e.counts;
        const T term = counts ? exp_of_negative(e.x - shift[a]) : T(0);
        value[a] += term;
        pairs[a] += counts;
        weights[(c.block + a) * c.chunk + j] = counts ? e.slope * term : T(0);
      });
    } else {
      c.each([&](int a, int64_t j, T s, bool positive, bool on) {
        const Score<T> score = formula(s, positive, c.anchors[a].given);
        value[a] += on ? score.value : T(0);
        weight[a] += on ? score.weight : T(0);
        pairs[a] += on && score.counts;
        weights[(c.block + a) * c.chunk + j] = on ? score.weight : T(0);
      });
    }
  });
  add_chunk(slot.formula, value, weight, pairs, shift, c, sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(const MemoryLossParams<T, T> p, const Pass pass,
                                                            const Workspace<T> w, int64_t first, int64_t chunk, T* s) {
  ChunkPairs<T> c;
  c.block = static_cast<int64_t>(blockIdx.x) * kAnchors;
  c.B = p.B;
  c.first = first;
  c.rows = stored_rows(p.count, p.M) - first;
  c.chunk = chunk;
  c.bank_labels = p.bank_labels;
  c.bank_ids = p.bank_ids;
  c.s = s;
#pragma unroll
  for (int a = 0; a < kAnchors; ++a) {
    const int64_t i = smaller(c.block + a, p.B - 1);
    c.anchors[a] = {p.labels[i], excluded_id(p, i), w.partial.given[i], w.partial.state[i]};
  }
  // The second slot first: the weights of the first take the place of the similarities.
#pragma unroll
  for (int k = kSlots - 1; k >= 0; --k) {
    c.pairs = pass.slot[k].pairs;
    if (c.pairs == Pairs::none) continue;
    score_chunk(c, pass.slot[k], w.partial.sums + k * p.B, w.rescale + k * p.B, s + k * p.B * chunk);
  }
}

// grad [B, D] of a slot of exponents *= rescale, where they have grown.
template <typename T>
__global__ void __launch_bounds__(kThreads) rescale_kernel(const T* rescale, int64_t D, T* grad) {
  const T factor = rescale[blockIdx.x];
  if (factor == T(1)) return;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) grad[blockIdx.x * D + d] *= factor;
}

// For the kernels that do not look at the bank: they need not be compiled for each of its dtypes.
template <typename T, typename S>
MemoryLossParams<T, T> without_bank(const MemoryLossParams<T, S>& p) {
  return {p.z,     p.labels,   nullptr,   p.bank_labels, p.count,       p.B,   p.M,    p.D,      p.scale,
          p.shift, p.bank_ids, p.exclude, p.anchors,     p.renormalize, p.eps, p.loss, p.grad_z, p.pairs};
}

}  // namespace

template <typename T>
Composite<T> plan_composite(int64_t B, int64_t M, int64_t D, const LossSpec& loss) {
  constexpr int64_t kCacheBytes = 24 << 20;  // half of an H100's second-level cache
  constexpr int64_t kMinChunk = 256;
  Composite<T> c = {};
  c.slots = slots_of(loss);
  const int64_t fitting = kCacheBytes / static_cast<int64_t>(sizeof(T)) / larger(1, c.slots * B + D);
  c.chunks = larger(1, ceil_div(M, larger(kMinChunk, fitting)));
  c.chunk = larger(1, ceil_div(ceil_div(M, c.chunks), 64) * 64);
  c.chunks = larger(1, ceil_div(M, c.chunk));
  c.rounds = 1;
  if (!goes_in_rounds(loss)) return c;
  constexpr int64_t kThresholdBytes = 64 << 20;
  constexpr int64_t kMinThresholds = 256;
  const int64_t held = kThresholdBytes / static_cast<int64_t>(sizeof(T) + sizeof(unsigned)) / larger(1, B);
  c.thresholds = larger(1, smaller(M, larger(kMinThresholds, held)));
  c.rounds = larger(1, ceil_div(M, c.thresholds));
  return c;
}

template <typename T>
int64_t composite_workspace(int64_t B, int64_t D, const Composite<T>& c) {
  return Workspace<T>(nullptr, B, D, c).bytes;
}

template <typename T, typename S>
int launch_composite_begin(const MemoryLossParams<T, S>& p, const Pass& pass, int k, const Composite<T>& c,
                           const Launch& launch) {
  const Workspace<T> w(launch.workspace, p.B, p.D, c);
  int error = cudaSuccess;
  if (c.round == 0) {
    const int64_t blocks = larger(1, smaller(larger(ceil_div(p.B, kWarps), ceil_div(p.D, kThreads)), 1024));
    error =
        run(begin_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads, launch, without_bank(p), pass, k == 0, w);
  }
  if (pass.slot[1].formula != Formula::threshold || p.B == 0 || error != cudaSuccess) return error;
  return launch_triplets_begin(without_bank(p), c, w.thresholds, launch);
}

template <typename T, typename S>
int launch_composite_rows(const MemoryLossParams<T, S>& p, const Composite<T>& c, int64_t first, const Launch& launch) {
  const Workspace<T> w(launch.workspace, p.B, p.D, c);
  const dim3 grid(static_cast<unsigned>(ceil_div(c.chunk, kWarps)));
  return run(rows_kernel<T, S>, grid, kThreads, launch, p, w, first, c.chunk, c.rows);
}

template <typename T, typename S>
int launch_composite_score(const MemoryLossParams<T, S>& p, const Pass& pass, const Composite<T>& c, int64_t first,
                           const Launch& launch) {
  if (p.B == 0) return cudaSuccess;
  const Workspace<T> w(launch.workspace, p.B, p.D, c);
  if (c.thresholds > 0) return launch_triplets_score(without_bank(p), pass, c, w.partial, w.thresholds, first, launch);
  int error = run(score_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.B, kAnchors))), kThreads, launch,
                  without_bank(p), pass, w, first, c.chunk, c.s);
  for (int k = 0; k < kSlots && error == cudaSuccess; ++k)
    if (pass.slot[k].pairs != Pairs::none && is_exponential(pass.slot[k].formula) && c.grad != nullptr && first > 0)
      error = run(rescale_kernel<T>, dim3(static_cast<unsigned>(p.B)), kThreads, launch, w.rescale + k * p.B, p.D,
                  c.grad + k * p.B * p.D);
  return error;
}

template <typename T, typename S>
int launch_composite_end(const MemoryLossParams<T, S>& p, const LossSpec& loss, int k, const Composite<T>& c,
                         const Launch& launch) {
  const Workspace<T> w(launch.workspace, p.B, p.D, c);
  const Program program = make_program(loss, p.grad_z != nullptr);
  if (c.thresholds > 0 && p.B > 0) {
    const int error = launch_triplets_end(without_bank(p), program.pass[k], w.partial, w.thresholds, launch);
    const bool settles = c.round + 1 == c.rounds && k + 1 == program.passes;
    if (error != cudaSuccess || !settles) return error;
  }
  return launch_settle(p, loss, k, w.partial, launch);
}

template Composite<float> plan_composite(int64_t, int64_t, int64_t, const LossSpec&);
template Composite<double> plan_composite(int64_t, int64_t, int64_t, const LossSpec&);
template int64_t composite_workspace(int64_t, int64_t, const Composite<float>&);
template int64_t composite_workspace(int64_t, int64_t, const Composite<double>&);

#define XBN_INSTANTIATE(T, S)                                                                                     \
  template int launch_composite_begin(const MemoryLossParams<T, S>&, const Pass&, int, const Composite<T>&,       \
                                      const Launch&);                                                             \
  template int launch_composite_rows(const MemoryLossParams<T, S>&, const Composite<T>&, int64_t, const Launch&); \
  template int launch_composite_score(const MemoryLossParams<T, S>&, const Pass&, const Composite<T>&, int64_t,   \
                                      const Launch&);                                                             \
  template int launch_composite_end(const MemoryLossParams<T, S>&, const LossSpec&, int, const Composite<T>&,     \
                                    const Launch&);
XBN_INSTANTIATE(float, float)
XBN_INSTANTIATE(float, double)
XBN_INSTANTIATE(double, float)
XBN_INSTANTIATE(double, double)
XBN_INSTANTIATE(float, Float16)
XBN_INSTANTIATE(double, Float16)
XBN_INSTANTIATE(float, BFloat16)
XBN_INSTANTIATE(double, BFloat16)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
