// memory_loss, fused: the loss of B anchors against the bank and its derivative by the anchors, in one sweep. float32.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], of which rows [0, count) count; D <= 1024
//   out    what loss_reduce.cu adds up: of every split, kind and anchor the sum of values and the number of active
//          pairs, [splits, kinds, B], and the sum of weight * row, [splits, kinds, B, D]; state [B] of the anchors
//   kinds  one, if the reduction scales positives and negatives alike. Else two, positives and negatives, and a sweep
//          for each in the same launch; that of the positives skips the tiles in which no row has a label of the
//          block's anchors: nine of ten with 16 labels in the batch of 11,318, none of few classes, where the loss then
//          costs twice as much.
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          loss = sum_ij value(s_ij),  grad_z_i = sum_j weight(s_ij) r_j  (formulas.h: the pair losses)
//   grid   (blocks of 64 anchors, 32 above D = 512) x splits of the bank x kinds, 256 threads. A block takes its share
//          of the bank in tiles of 64 rows; loss_tile.cuh has the three phases:
//            1 similarities  64 x 64 in registers, 4 x 4 a thread; operands pass through shared memory 32 columns at a
//                            time, the next ones on their way meanwhile; the rows' norms fall out on the side
//            2 scores        value and weight of every pair; rows in which no pair is active are dropped
//            3 gradient      weights x the rows that are left, read a second time: a tile of all D columns would not
//                            fit shared memory, and is still in the second-level cache. The sums of all D columns stay
//                            in registers until the last tile, 128 a thread at D = 512
//          The similarities never leave the block: nothing of size B x M exists.
//   keeps  the partial sums in the workspace: with one kind, 64 x D floats for each block that runs at once; on 132
//          multiprocessors with B = 64, D = 512: 17 MB, with two kinds twice that
//   needs  16-byte loads of z and bank where D and the addresses allow them; 34 to 39 KB of shared memory; no spills
//   digits products, scores and a thread's sums in float; splits, lanes and anchors are added in double, but for the
//          gradient. scale and shift are rounded to float once.
//   order  splits by shape and number of multiprocessors, rows of a split in order, splits added in order:
//          the same bits every run on the same kind of GPU
#include "loss_tile.cuh"

namespace xbn::cuda {
namespace {

// Anchors of this block. Those that fill it up, and those that are none, have no kRanks and pair with nobody.
template <int kDim>
__device__ void load_anchors(const MemoryLossParams<float, float>& p, Shared<kDim>& shared, int64_t first,
                             uint8_t* state) {
  for (int k = threadIdx.x / kWarp; k < Shape<kDim>::kAnchors; k += kThreads / kWarp) {
    const int64_t i = first + k;
    Anchor anchor = {0, -1, kFinite};
    if (i < p.B) {
      anchor.label = p.labels[i];
      if (p.exclude != nullptr) anchor.exclude = p.exclude[i];
      anchor.state = anchor_state(p, i);
      if (state != nullptr && threadIdx.x % kWarp == 0) state[i] = anchor.state;
    }
    if (threadIdx.x % kWarp == 0) shared.anchors[k] = anchor;
  }
}

template <int kDim, typename Loss>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    sweep_kernel(const MemoryLossParams<float, float> p, const Loss loss, const PartialLoss<float> partial, bool wide) {
  using Sizes = Shape<kDim>;
  __shared__ Shared<kDim> shared;
  const int thread = threadIdx.x, x = thread % kSide, y = thread / kSide;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.x) * Sizes::kAnchors;
  const int kind = partial.kinds == 1 ? kBoth : static_cast<int>(blockIdx.z);
  const bool reports = blockIdx.y == 0 && blockIdx.z == 0;
  load_anchors(p, shared, first_anchor, reports ? partial.state : nullptr);
  for (int d = thread; d < kDim; d += kThreads) {
    shared.scale[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f;
    shared.shift[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f;
  }

  const int64_t count = stored_rows(p.count, p.M), tiles = ceil_div(count, kTile);
  const int64_t tiles_of_split = ceil_div(tiles, gridDim.y);
  const int64_t first_tile = blockIdx.y * tiles_of_split, last_tile = smaller(first_tile + tiles_of_split, tiles);

  float4 grad[Sizes::kChunks][Sizes::kRows];
#pragma unroll
  for (int c = 0; c < Sizes::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < Sizes::kRows; ++i) grad[c][i] = make_float4(0, 0, 0, 0);
  float value[Sizes::kSquare] = {};
  int active[Sizes::kSquare] = {};

  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t begin = t * kTile;
    const int rows = static_cast<int>(smaller(kTile, count - begin));
    if (thread < kTile) shared.labels[thread] = thread < rows ? p.bank_labels[begin + thread] : 0;
    __syncthreads();
    if (kind == kPositive) {
      bool match = false;
      for (int k = y; k < Sizes::kAnchors; k += kSide)
        for (int j = x; j < rows; j += kSide)
          match = match || ((shared.anchors[k].state & kRanks) && shared.anchors[k].label == shared.labels[j]);
      if (!__syncthreads_or(match)) continue;
    }
    float dot[Sizes::kSquare][4] = {};
    similarities<kDim>(p, shared, first_anchor, begin, rows, wide, dot);
    const int n = score_tile<kDim>(shared, loss, begin, rows, kind, dot, value, active);
    if (partial.grad != nullptr) add_gradient<kDim>(p, shared, begin, n, wide, grad);
  }

  const int64_t slice = (blockIdx.y * partial.kinds + blockIdx.z) * p.B;  // [B] of this split and kind
#pragma unroll
  for (int i = 0; i < Sizes::kSquare; ++i) {
    double sum = value[i], pairs = active[i];
    for (int step = 1; step < kSide; step *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
      pairs += __shfl_xor_sync(0xffffffffu, pairs, step);
    }
    const int64_t anchor = first_anchor + Sizes::kSquare * y + i;
    if (x == 0 && anchor < p.B) partial.sums[slice + anchor] = {sum, pairs};
  }
  if (partial.grad == nullptr) return;
  const int lane = thread % Sizes::kLanes, group = thread / Sizes::kLanes;
#pragma unroll
  for (int c = 0; c < Sizes::kChunks; ++c)
#pragma unroll
    for (int i = 0; i < Sizes::kRows; ++i) {
      const int64_t anchor = first_anchor + Sizes::kRows * group + i, column = c * Sizes::kChunk + 4 * lane;
      if (anchor >= p.B || column >= p.D) continue;
      float* at = partial.grad + (slice + anchor) * p.D + column;
      if (wide) {
        *reinterpret_cast<float4*>(at) = grad[c][i];
        continue;
      }
      const float four[4] = {grad[c][i].x, grad[c][i].y, grad[c][i].z, grad[c][i].w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + e < p.D) at[e] = four[e];
    }
}

// The smallest of the five sizes that holds D columns.
int padded_dim(int64_t D) {
  int dim = 64;
  while (dim < D) dim *= 2;
  return dim;
}

struct Plan {
  int64_t blocks;  // of anchors
  int64_t splits;  // of the bank: as many blocks in all as run at once
};

Plan plan_sweep(int64_t B, int64_t M, int64_t D, int multiprocessors) {
  const int dim = padded_dim(D), anchors = anchors_of_block(dim), resident = multiprocessors * blocks_at_once(dim);
  const int64_t blocks = larger(1, ceil_div(B, anchors));
  return {blocks, larger(1, smaller(resident / blocks, ceil_div(M, kTile)))};
}

PartialLoss<float> partial_loss(Carver& carve, const Plan& plan, int64_t B, int64_t D, bool mean, bool need_grad) {
  const int64_t kinds = mean ? 1 : 2, rows = plan.splits * kinds * B;
  PartialLoss<float> partial;
  partial.splits = plan.splits;
  partial.kinds = kinds;
  partial.sums = carve.take<RowSums>(rows);
  partial.state = carve.take<uint8_t>(B);
  partial.factor = carve.take<float>(2);
  partial.grad = need_grad ? carve.take<float>(rows * D) : nullptr;
  return partial;
}

template <int kDim, typename Loss>
int launch_sweep_of(const MemoryLossParams<float, float>& p, const Loss& loss, const PartialLoss<float>& partial,
                    const Plan& plan, const Launch& launch) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool wide = p.D % 4 == 0 && aligned(p.z) && aligned(p.bank);
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits),
                  static_cast<unsigned>(partial.kinds));
  return run(sweep_kernel<kDim, Loss>, grid, kThreads, launch, p, loss, partial, wide);
}

}  // namespace

int64_t sweep_workspace(int64_t B, int64_t M, int64_t D, bool mean, bool need_grad, int multiprocessors) {
  Carver carve(nullptr);
  partial_loss(carve, plan_sweep(B, M, D, multiprocessors), B, D, mean, need_grad);
  return carve.bytes();
}

template <typename Loss>
int launch_sweep(const MemoryLossParams<float, float>& p, const Loss& loss, const Launch& launch) {
  const Plan plan = plan_sweep(p.B, p.M, p.D, launch.multiprocessors);
  Carver carve(launch.workspace);
  const PartialLoss<float> partial = partial_loss(carve, plan, p.B, p.D, p.mean, p.grad_z != nullptr);
  int error = cudaErrorInvalidValue;
  switch (padded_dim(p.D)) {
    case 64: error = launch_sweep_of<64>(p, loss, partial, plan, launch); break;
    case 128: error = launch_sweep_of<128>(p, loss, partial, plan, launch); break;
    case 256: error = launch_sweep_of<256>(p, loss, partial, plan, launch); break;
    case 512: error = launch_sweep_of<512>(p, loss, partial, plan, launch); break;
    case 1024: error = launch_sweep_of<1024>(p, loss, partial, plan, launch); break;
  }
  return error != cudaSuccess ? error : launch_reduce(p, partial, launch);
}

template int launch_sweep(const MemoryLossParams<float, float>&, const Contrastive<float>&, const Launch&);

}  // namespace xbn::cuda
