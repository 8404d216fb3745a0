// The kernel of all sweeps, sweep.cu, sweep_tensor.cu and sweep_tensor_16bit.cu, and how it is launched: a file each, so
// that they are compiled side by side.
#pragma once

#include <type_traits>

#include "pass.cuh"
#include "products_simt.cuh"
#include "products_tensor.cuh"
#include "score.cuh"

namespace xbn::cuda {

// Anchors of this block. Padding and rows that are no anchors lack kRanks and form no pairs.
template <int kDim>
__device__ void load_anchors(const RankParams<float>& p, Shared<kDim>& shared, int64_t first,
                             const PartialLoss<float>& partial, bool reports) {
  if (reports && blockIdx.x == 0 && threadIdx.x == 0) *partial.ticket = 0;
  for (int k = threadIdx.x / kWarp; k < Shape<kDim>::kAnchors; k += kThreads / kWarp) {
    const int64_t i = first + k;
    Anchor<float> anchor = {0, kAnchorWithoutId, 0, kFinite};
    if (i < p.B) {
      anchor.label = p.labels[i];
      anchor.exclude = excluded_id(p, i);
      if (partial.given != nullptr) anchor.given = partial.given[i];
      anchor.state = anchor_state(p, i);
      if (reports && threadIdx.x % kWarp == 0) partial.state[i] = anchor.state;
    }
    if (threadIdx.x % kWarp == 0) shared.anchors[k] = anchor;
  }
}

// Splits have as many tiles as others or one more; where there are fewer tiles than splits, the first have one.
__device__ __forceinline__ int64_t first_tile(int64_t split, int64_t count) {
  const int64_t tiles = ceil_div(count, kTile), splits = smaller(gridDim.y, larger(tiles, 1));
  return smaller(split, splits) * tiles / splits;
}

template <int kDim, bool kTensor, typename S>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    sweep_kernel(const MemoryLossParams<float, S> p, const Pass pass, const PartialLoss<float> partial, bool wide) {
  using Sizes = Shape<kDim>;
  using Products = std::conditional_t<kTensor, TensorProducts<kDim>, SimtProducts<kDim>>;
  if constexpr (kTensor && !kHasTensorCores) return;
  __shared__ Shared<kDim> shared;
  if (partial.shortcut.is_taken()) return;
  const int thread = threadIdx.x;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.x) * Sizes::kAnchors;
  const int k = pass.slot[0].pairs == Pairs::none ? 1 : static_cast<int>(blockIdx.z);
  load_anchors(p, shared, first_anchor, partial, blockIdx.y == 0 && blockIdx.z == 0);
  const int64_t count = stored_rows(p.count, p.M), first_row = first_tile(blockIdx.y, count) * kTile;
  // In shared memory they take no registers; and a slot indexed at run time would be copied to the stack.
  if (thread == 0) {
    shared.slot = k == 0 ? pass.slot[0] : pass.slot[1];
    shared.end = smaller(first_tile(blockIdx.y + 1, count) * kTile, count);
  }
  __syncthreads();
  if (thread < Sizes::kAnchors) shared.sums[thread] = no_sums(shared.slot.formula);
  for (int d = thread; d < kDim; d += kThreads) {
    shared.scale[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f;
    shared.shift[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f;
  }

  const auto weighs = [&] { return partial.grad != nullptr && !shared.slot.only_sums; };
  Products products;
  for (int64_t begin = first_row; begin < shared.end; begin += kTile) {
    const int rows = static_cast<int>(smaller(kTile, shared.end - begin));
    if (thread < kTile) {
      shared.labels[thread] = thread < rows ? p.bank_labels[begin + thread] : 0;
      shared.ids[thread] = thread < rows ? row_id(p.bank_ids, begin + thread) : 0;
    }
    prefetch_by_block<kThreads>(p.bank + (begin + kTile) * p.D, smaller(kTile, shared.end - begin - kTile) * p.D);
    __syncthreads();
    if (shared.slot.pairs == Pairs::positives) {
      const int at = hidden(thread), x = at % kSide, y = at / kSide;
      bool match = false;
      for (int k = y; k < Sizes::kAnchors; k += kSide)
        for (int j = x; j < rows; j += kSide)
          match = match || ((shared.anchors[k].state & kRanks) && shared.anchors[k].label == shared.labels[j]);
      if (!__syncthreads_or(match)) continue;
    }
    float dot[Sizes::kSquare][4] = {};
    // Computed again: it takes no registers through the other phases.
    const int64_t anchors = static_cast<int64_t>(hidden(static_cast<int>(blockIdx.x))) * Sizes::kAnchors;
    Products::similarities(p, shared, anchors, begin, rows, wide, dot);
    const Scored scored = score_tile<kDim>(shared, begin, rows, weighs(), dot);
    if (scored.rescale) products.rescale(shared.rescale);
    if (weighs()) products.add(p, shared, begin, scored.rows, wide);
  }

  __syncthreads();
  // [B] of this split and slot: worked out here, with slot and anchors, for the same reason.
  const int filled = pass.slot[0].pairs == Pairs::none ? 1 : hidden(static_cast<int>(blockIdx.z));
  const int64_t slice = (hidden(static_cast<int>(blockIdx.y)) * partial.slots + filled) * p.B;
  const int64_t first = static_cast<int64_t>(hidden(static_cast<int>(blockIdx.x))) * Sizes::kAnchors;
  if (thread < Sizes::kAnchors && first + thread < p.B) partial.sums[slice + first + thread] = shared.sums[thread];
  if (!weighs()) return;
  products.store(partial.grad + (slice + first) * p.D, p.B - first, p.D, wide);
}

// The smallest of the five sizes that holds D columns.
inline int padded_dim(int64_t D) {
  int dim = 64;
  while (dim < D) dim *= 2;
  return dim;
}

template <bool kTensor, typename S>
int launch_pass(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
                const SweepGrid& plan, bool wide, const Gpu& gpu) {
  const bool both = pass.slot[0].pairs != Pairs::none && pass.slot[1].pairs != Pairs::none;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits), both ? 2 : 1);
  const auto with = [&](auto kernel) { return run(kernel, grid, kThreads, gpu, p, pass, partial, wide); };
  switch (padded_dim(p.D)) {
    case 64: return with(sweep_kernel<64, kTensor, S>);
    case 128: return with(sweep_kernel<128, kTensor, S>);
    case 256: return with(sweep_kernel<256, kTensor, S>);
    case 512: return with(sweep_kernel<512, kTensor, S>);
    case 1024: return with(sweep_kernel<1024, kTensor, S>);
  }
  return cudaErrorInvalidValue;
}

// Compiled in sweep_tensor.cu and sweep_tensor_16bit.cu.
#define XBN_DECLARE(S, ...)                                                                                        \
  extern template int launch_pass<true>(const MemoryLossParams<float, S>&, const Pass&, const PartialLoss<float>&, \
                                        const SweepGrid&, bool, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_DECLARE)
#undef XBN_DECLARE

}  // namespace xbn::cuda
