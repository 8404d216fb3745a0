// memory_loss as two library products per chunk of the bank: for many anchors, for float64 and for D > 1024. These are
// the kernels around the products; launch.h says in which order the caller runs them.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], of which rows [0, count) count
//   out    loss [1], grad_z [B, D]
//   math   as loss.cu, a chunk of the bank at a time: rows r_j, similarities s = z r^T, weights, grad += weights r
//   grid   begin_kernel: a warp to an anchor;  rows_kernel: a warp to a bank row;  score_kernel: a block to 4 anchors
//   keeps  one chunk of rows [chunk, D] and similarities [kinds * B, chunk], small enough for a second-level cache, and
//          the gradient [kinds * B, D]. A small B x M may be one chunk; of a large one it is 24 MB, or 256 rows.
//   needs  all M rows are gone through whatever the count, since the number of products is decided before the count is
//          known; rows beyond it count for nothing
//   order  chunks one after the other; a block adds to the sums of its anchors alone: the same bits every run, as far
//          as the library's products are
#include "loss_partial.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAnchors = 4;  // that a block scores at a time, for one reading of the bank's labels

template <typename T>
struct Workspace {
  T* map;  // [2, D] scale and shift in T
  PartialLoss<T> partial;
  int64_t bytes;

  Workspace(void* memory, int64_t B, int64_t D, int64_t kinds) {
    Carver carve(memory);
    map = carve.take<T>(2 * D);
    partial.splits = 1;
    partial.kinds = kinds;
    partial.sums = carve.take<RowSums>(kinds * B);
    partial.state = carve.take<uint8_t>(B);
    partial.factor = carve.take<T>(2);
    partial.grad = nullptr;  // the caller's
    bytes = carve.bytes();
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) begin_kernel(const MemoryLossParams<T, S> p, const Workspace<T> w) {
  const int64_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = gridDim.x * kWarps;
  for (int64_t i = warp; i < p.B; i += warps) {
    const uint8_t state = anchor_state(p, i);
    if (threadIdx.x % kWarp != 0) continue;
    w.partial.state[i] = state;
    for (int64_t kind = 0; kind < w.partial.kinds; ++kind) w.partial.sums[kind * p.B + i] = {0, 0};
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
  const auto row = [&](int64_t d) { return exists ? w.map[d] * static_cast<T>(u[d]) + w.map[p.D + d] : T(0); };
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

template <typename T, typename S, typename Loss>
__global__ void __launch_bounds__(kThreads) score_kernel(const MemoryLossParams<T, S> p, const Loss loss,
                                                         const Workspace<T> w, int64_t first, int64_t chunk, T* s) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kAnchors, rows = stored_rows(p.count, p.M) - first;
  Anchor anchors[kAnchors];
#pragma unroll
  for (int a = 0; a < kAnchors; ++a) {
    const int64_t i = smaller(block + a, p.B - 1);
    anchors[a] = {p.labels[i], p.exclude != nullptr ? p.exclude[i] : -1, w.partial.state[i]};
  }
  T value[kAnchors][2] = {};
  int active[kAnchors][2] = {};
  for (int64_t j = threadIdx.x; j < chunk; j += kThreads) {
    const bool exists = j < rows;
    const int64_t label = exists ? p.bank_labels[first + j] : 0;
    T similarity[kAnchors];
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) similarity[a] = block + a < p.B ? s[(block + a) * chunk + j] : T(0);
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) {
      if (block + a >= p.B) break;
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        if (kind >= w.partial.kinds) break;
        Pair<T> pair = {T(0), T(0)};
        if (exists)
          pair = score_pair(loss, anchors[a], first + j, label, similarity[a], w.partial.kinds == 1 ? kBoth : kind);
        value[a][kind] += pair.value;
        active[a][kind] += pair.weight != T(0);
        s[(kind * p.B + block + a) * chunk + j] = pair.weight;
      }
    }
  }
#pragma unroll
  for (int a = 0; a < kAnchors; ++a)
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      if (block + a >= p.B || kind >= w.partial.kinds) break;
      const double value_of_all = block_sum<kThreads>(static_cast<double>(value[a][kind]));
      const double active_of_all = block_sum<kThreads>(static_cast<double>(active[a][kind]));
      if (threadIdx.x != 0) continue;
      RowSums& sums = w.partial.sums[kind * p.B + block + a];
      sums.value += value_of_all;
      sums.active += active_of_all;
    }
}

}  // namespace

template <typename T>
Composite<T> plan_composite(int64_t B, int64_t M, int64_t D, bool mean) {
  constexpr int64_t kCacheBytes = 24 << 20;  // half of an H100's second-level cache
  constexpr int64_t kMinChunk = 256;
  Composite<T> c = {};
  c.kinds = mean ? 1 : 2;
  const int64_t fitting = kCacheBytes / static_cast<int64_t>(sizeof(T)) / larger(1, c.kinds * B + D);
  c.chunks = larger(1, ceil_div(M, larger(kMinChunk, fitting)));
  c.chunk = larger(1, ceil_div(ceil_div(M, c.chunks), 64) * 64);
  c.chunks = larger(1, ceil_div(M, c.chunk));
  return c;
}

int64_t composite_workspace(int64_t B, int64_t D, int64_t kinds) {
  return Workspace<double>(nullptr, B, D, kinds).bytes;  // enough for float, too
}

template <typename T, typename S>
int launch_composite_begin(const MemoryLossParams<T, S>& p, const Composite<T>& c, const Launch& launch) {
  const Workspace<T> w(launch.workspace, p.B, p.D, c.kinds);
  const int64_t blocks = larger(1, smaller(larger(ceil_div(p.B, kWarps), ceil_div(p.D, kThreads)), 1024));
  return run(begin_kernel<T, S>, dim3(static_cast<unsigned>(blocks)), kThreads, launch, p, w);
}

template <typename T, typename S>
int launch_composite_rows(const MemoryLossParams<T, S>& p, const Composite<T>& c, int64_t first, const Launch& launch) {
  const Workspace<T> w(launch.workspace, p.B, p.D, c.kinds);
  const dim3 grid(static_cast<unsigned>(ceil_div(c.chunk, kWarps)));
  return run(rows_kernel<T, S>, grid, kThreads, launch, p, w, first, c.chunk, c.rows);
}

template <typename T, typename S, typename Loss>
int launch_composite_score(const MemoryLossParams<T, S>& p, const Loss& loss, const Composite<T>& c, int64_t first,
                           const Launch& launch) {
  if (p.B == 0) return cudaSuccess;
  const Workspace<T> w(launch.workspace, p.B, p.D, c.kinds);
  return run(score_kernel<T, S, Loss>, dim3(static_cast<unsigned>(ceil_div(p.B, kAnchors))), kThreads, launch, p, loss,
             w, first, c.chunk, c.s);
}

template <typename T, typename S>
int launch_composite_end(const MemoryLossParams<T, S>& p, const Composite<T>& c, const Launch& launch) {
  PartialLoss<T> partial = Workspace<T>(launch.workspace, p.B, p.D, c.kinds).partial;
  partial.grad = c.grad;
  return launch_reduce(p, partial, launch);
}

template Composite<float> plan_composite(int64_t, int64_t, int64_t, bool);
template Composite<double> plan_composite(int64_t, int64_t, int64_t, bool);

#define XBN_INSTANTIATE(T, S)                                                                                     \
  template int launch_composite_begin(const MemoryLossParams<T, S>&, const Composite<T>&, const Launch&);         \
  template int launch_composite_rows(const MemoryLossParams<T, S>&, const Composite<T>&, int64_t, const Launch&); \
  template int launch_composite_score(const MemoryLossParams<T, S>&, const Contrastive<T>&, const Composite<T>&,  \
                                      int64_t, const Launch&);                                                    \
  template int launch_composite_end(const MemoryLossParams<T, S>&, const Composite<T>&, const Launch&);
XBN_INSTANTIATE(float, float)
XBN_INSTANTIATE(float, double)
XBN_INSTANTIATE(double, float)
XBN_INSTANTIATE(double, double)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
