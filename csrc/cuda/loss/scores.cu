// Similarities of a chunk of the bank become weights, and what they say of each anchor is added to its sums.
//
//   in     s [B, chunk] of bank rows [first, first + chunk); labels [B], given [B]; bank_labels [M], bank_ids [M] or
//          null; rows [0, count) count
//   out    in the place of s, weights [slots * B, chunk]; of every split sums [splits, slots, B] so far, and rescale
//          [splits, kSlots, B]. For products of halves the weights are multiplied by `inverse`, their largest one is
//          told, and which 32 rows have one. begin_kernel: state [B], given [B], sums of no pairs
//   math   score_block.cuh
//   grid   begin_kernel: a warp to an anchor.  score_kernel: (4 anchors) x splits, a block to each
//   needs  any GPU; float and double
//   order  that of score_block.cuh: the same bits every run
#include "scores.cuh"

#include "chunk.cuh"

namespace xbn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    begin_kernel(const RankParams<T> p, const Pass pass, const Given given, const PartialLoss<T> partial, T* map) {
  const int64_t warp = blockIdx.x * kBlockWarps + threadIdx.x / kWarp, warps = gridDim.x * kBlockWarps;
  const int lane = threadIdx.x % kWarp;
  if (blockIdx.x == 0 && threadIdx.x == 0) *partial.ticket = 0;
  for (int64_t i = warp; i < p.B; i += warps) {
    const uint8_t state = anchor_state(p, i);
    if (lane == 0) {
      partial.state[i] = state;
      if (given.now) partial.given[i] = given.values != nullptr ? static_cast<T>(given.values[i]) : T(0);
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (pass.slot[k].pairs == Pairs::none) continue;
      if (pass.slot[k].formula == Formula::weigh) continue;  // that goes on with its thresholds'
      const RowSums none = no_sums(pass.slot[k].formula);
      for (int64_t split = lane; split < partial.splits; split += kWarp)
        partial.sums[(split * partial.slots + k) * p.B + i] = none;
    }
  }
  if (map == nullptr) return;
  for (int64_t d = blockIdx.x * kBlockThreads + threadIdx.x; d < p.D; d += gridDim.x * kBlockThreads) {
    map[d] = p.scale != nullptr ? static_cast<T>(p.scale[d]) : T(1);
    map[p.D + d] = p.scale != nullptr ? static_cast<T>(p.shift[d]) : T(0);
  }
}

// Keeps the weights of a slot. They may take the place of the similarities.
template <typename T, int kAnchors>
struct ChunkWeights {
  T* weights;  // [kAnchors, stride], or null
  int64_t stride;
  T* factors;         // [kAnchors] for the gradient so far
  const T* inverse;   // of the columns, or null
  uint8_t* some;      // of each 32 columns
  int64_t some_step;  //
  T largest[kAnchors];

  __device__ __forceinline__ void weight(int a, int64_t j, T weight) {
    if (weights == nullptr) return;
    if (inverse != nullptr) {
      if (weight != T(0)) weight *= inverse[j];
      largest[a] = std::fabs(weight) > largest[a] ? std::fabs(weight) : largest[a];
      const bool any = __any_sync(0xffffffffu, weight != T(0));
      if (threadIdx.x % kWarp == 0 && (a == 0 || any)) some[j / kWarp * some_step] = any;
    }
    weights[a * stride + j] = weight;
  }
  __device__ __forceinline__ void rescale(int a, T factor) const { factors[a] = factor; }
};

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    score_kernel(const RankParams<T> p, const Pass pass, const PartialLoss<T> partial, const ChunkScores<T> chunk) {
  constexpr int kAnchors = ChunkScores<T>::kGroup;
  const bool for_halves = chunk.inverse != nullptr;
  if (for_halves && !partial.shortcut.is_taken()) return;
  const int64_t begin = blockIdx.y * chunk.part;
  const ChunkPairs<T, kAnchors> block(p, partial, chunk.first, chunk.chunk, chunk.s, begin, chunk.part);
  const int mine = static_cast<int>(threadIdx.x);  // the first threads, one to an anchor
  // The second slot first: the weights of the first take the place of the similarities.
#pragma unroll
  for (int k = kSlots - 1; k >= 0; --k) {
    if (pass.slot[k].pairs == Pairs::none) continue;
    const int64_t at = (blockIdx.y * kSlots + k) * p.B + block.first_anchor;
    const int64_t some_step = chunk.row_of_some(p.B);
    ChunkWeights<T, kAnchors> kept = {};
    kept.stride = chunk.chunk;
    kept.factors = chunk.rescale + at;
    if (partial.grad != nullptr && pass.weighs(k))
      kept.weights = chunk.s + (k * p.B + block.first_anchor) * chunk.chunk + begin;
    if (for_halves) {
      kept.inverse = chunk.inverse + begin;
      kept.some = chunk.some + (k * chunk.chunk + begin) / kWarp * some_step + blockIdx.x;
      kept.some_step = some_step;
    }
    score_pairs<T>(block, pass.slot[k], partial.sums + (blockIdx.y * partial.slots + k) * p.B + block.first_anchor,
                   kept);
    if (!for_halves || kept.weights == nullptr) continue;
    const BlockTops<kBlockThreads, kAnchors, T> tops(kept.largest);
    if (mine < kAnchors && block.has(mine)) chunk.largest[at + mine] = tops[mine];
  }
}

}  // namespace

template <typename T>
int launch_begin(const RankParams<T>& p, const Pass& pass, const Given& given, const PartialLoss<T>& partial, T* map,
                 const Gpu& gpu) {
  const int64_t blocks = larger(ceil_div(p.B, kBlockWarps), map != nullptr ? ceil_div(p.D, kBlockThreads) : 1);
  const dim3 grid(static_cast<unsigned>(larger(1, smaller(blocks, 1024))));
  return run(begin_kernel<T>, grid, kBlockThreads, gpu, p, pass, given, partial, map);
}

template <typename T>
int launch_scores(const RankParams<T>& p, const Pass& pass, const PartialLoss<T>& partial, const ChunkScores<T>& chunk,
                  const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.B, ChunkScores<T>::kGroup)),
                  static_cast<unsigned>(ceil_div(chunk.chunk, chunk.part)));
  return run(score_kernel<T>, grid, kBlockThreads, gpu, p, pass, partial, chunk);
}

#define XBN_INSTANTIATE(T)                                                                                           \
  template int launch_begin(const RankParams<T>&, const Pass&, const Given&, const PartialLoss<T>&, T*, const Gpu&); \
  template int launch_scores(const RankParams<T>&, const Pass&, const PartialLoss<T>&, const ChunkScores<T>&,        \
                             const Gpu&);
XBN_INSTANTIATE(float)
XBN_INSTANTIATE(double)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
