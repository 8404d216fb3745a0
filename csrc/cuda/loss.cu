// memory_loss, fused: the loss of B anchors against the bank and its derivative by the anchors, in one sweep. float32.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], of which rows [0, count) count; D <= 1024
//   out    partial sums, of values [splits, kinds, B] and of weight * row [splits, kinds, B, D], which loss_reduce.cu
//          adds up
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          loss = sum_ij value(s_ij),  grad_z_i = sum_j weight(s_ij) r_j  (formulas.h: the pair losses)
//   grid   (blocks of 64 anchors, 32 above D = 512) x splits of the bank x kinds, 256 threads. A block takes its share
//          of the bank in tiles of 64 rows:
//            1 similarities  64 x 64 in registers, 4 x 4 a thread; operands pass through shared memory 32 columns at a
//                            time, the next ones on their way meanwhile; the rows' norms fall out on the side
//            2 scores        value and weight of every pair; rows in which no pair is active are dropped
//            3 gradient      weights x the rows that are left, read a second time (from the second-level cache); the
//                            sums of all D columns stay in registers until the last tile
//          The similarities never leave the block: nothing of size B x M exists.
//   kinds  a reduction that scales positives and negatives apart takes a sweep for each, in the same launch. That of
//          the positives skips the tiles in which no row has a label of the block's anchors: nine of ten with 16 labels
//          in the batch of 11,318, none of few classes, where the loss then costs twice as much.
//   keeps  splits x kinds x B x D floats in the workspace, 64 x D of each kind for every block that runs at once
//   needs  16-byte loads of z and bank where D and the addresses allow them; 34 to 39 KB of shared memory; no spills
//   order  splits by shape and number of multiprocessors, rows of a split in order, splits added in order:
//          the same bits every run on the same kind of GPU
#include "loss_partial.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // bank rows
constexpr int kDepth = 32;  // columns of the operands, or rows of the gradient's, in shared memory at a time
constexpr int kSide = 16;   // the threads as a square, for the similarities

// How kDim columns (D, rounded up to one of five sizes) are spread over a block.
template <int kDim>
struct Shape {
  static constexpr int kAnchors = kDim <= 512 ? 64 : 32;
  static constexpr int kSquare = kAnchors / kSide;        // anchors of a thread, similarities
  static constexpr int kChunk = kDim < 128 ? kDim : 128;  // columns that the threads cover side by side, gradient
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kLanes = kChunk / 4;            // threads side by side
  static constexpr int kGroups = kThreads / kLanes;    // and below each other
  static constexpr int kRows = kAnchors / kGroups;     // anchors of a thread, gradient
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;  // that fit a multiprocessor
};

// An operand [kDepth][kWidth] in shared memory, column k of all rows side by side. Groups of four rows are swapped by
// column, so that neither writing a row nor reading a column hits one bank twice.
template <int kWidth>
__device__ __forceinline__ int swizzled(int k, int row) {
  constexpr int kGroups = kWidth / 4;
  return k * kWidth + ((((row >> 2) ^ (k >> 2)) & (kGroups - 1)) << 2) + (row & 3);
}

// Columns k … k + 3 of a row, zero beyond D.
__device__ __forceinline__ float4 load4(const float* row, int k, int D, bool wide) {
  if (wide) return k < D ? *reinterpret_cast<const float4*>(row + k) : make_float4(0, 0, 0, 0);
  return make_float4(k < D ? row[k] : 0.0f, k + 1 < D ? row[k + 1] : 0.0f, k + 2 < D ? row[k + 2] : 0.0f,
                     k + 3 < D ? row[k + 3] : 0.0f);
}

__device__ __forceinline__ float4 affine4(const float* scale, const float* shift, int k, float4 u) {
  const float4 a = *reinterpret_cast<const float4*>(scale + k), b = *reinterpret_cast<const float4*>(shift + k);
  return make_float4(fmaf(a.x, u.x, b.x), fmaf(a.y, u.y, b.y), fmaf(a.z, u.z, b.z), fmaf(a.w, u.w, b.w));
}

template <int kDim>
struct Shared {
  static constexpr int kAnchors = Shape<kDim>::kAnchors;

  alignas(16) float operands[2 * kDepth * kTile];  // anchors and rows, or the gradient's rows
  alignas(16) float weights[kTile * kAnchors];     // [active row][anchor], anchors swizzled
  alignas(16) float scale[kDim];
  alignas(16) float shift[kDim];
  Anchor anchors[kAnchors];
  int64_t labels[kTile];
  float inverse_norm[kTile];
  unsigned active[kThreads / kWarp][4];  // by warp: which of the columns 4 x + j have an active pair, a bit for each x
  int list[kTile];                       // the rows of the tile with an active pair
};

// Anchors of this block. Those that fill it up, and those that are none, have no kRanks and pair with nobody.
template <int kDim>
__device__ void load_anchors(const MemoryLossParams<float, float>& p, Shared<kDim>& shared, int64_t first,
                             uint8_t* state) {
  for (int k = threadIdx.x / kWarp; k < Shape<kDim>::kAnchors; k += kThreads / kWarp) {
    const int64_t i = first + k;
    Anchor anchor = {0, -1, kFinite};
    if (i < p.B) {
      const bool finite = warp_row_is_finite(p.z + i * p.D, p.D);
      const bool ranks = p.anchors == nullptr || p.anchors[i];
      anchor.label = p.labels[i];
      if (p.exclude != nullptr) anchor.exclude = p.exclude[i];
      anchor.state = static_cast<uint8_t>((ranks ? kRanks : 0) | (finite ? kFinite : 0));
      if (state != nullptr && threadIdx.x % kWarp == 0) state[i] = anchor.state;
    }
    if (threadIdx.x % kWarp == 0) shared.anchors[k] = anchor;
  }
}

// Phase 1: dot[i][j] = anchor kSquare * y + i times row 4 * x + j of the tile, and the rows' inverse norms.
template <int kDim>
__device__ __forceinline__ void similarities(const MemoryLossParams<float, float>& p, Shared<kDim>& shared,
                                             int64_t first_anchor, int64_t begin, int rows, bool wide,
                                             float (&dot)[Shape<kDim>::kSquare][4]) {
  constexpr int kAnchors = Shape<kDim>::kAnchors, kSquare = Shape<kDim>::kSquare;
  constexpr int kAnchorLoads = kAnchors * (kDepth / 4) / kThreads, kRowLoads = kTile * (kDepth / 4) / kThreads;
  const int thread = threadIdx.x, x = thread % kSide, y = thread / kSide, D = static_cast<int>(p.D);
  const int row = thread / (kDepth / 4), column = thread % (kDepth / 4) * 4;  // what this thread loads, first of some
  constexpr int kRowStep = kThreads / (kDepth / 4);
  float* anchors = shared.operands;
  float* tile = shared.operands + kDepth * kTile;

  float4 z[kAnchorLoads], u[kRowLoads];
  float square[kRowLoads] = {};
  const auto load = [&](int k) {
#pragma unroll
    for (int q = 0; q < kAnchorLoads; ++q) {
      const int64_t i = first_anchor + row + q * kRowStep;
      z[q] = i < p.B ? load4(p.z + i * p.D, k + column, D, wide) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int q = 0; q < kRowLoads; ++q) {
      const int j = row + q * kRowStep;
      u[q] = j < rows ? load4(p.bank + (begin + j) * p.D, k + column, D, wide) : make_float4(0, 0, 0, 0);
    }
  };
  const auto store = [&](int k) {
#pragma unroll
    for (int q = 0; q < kAnchorLoads; ++q) {
      float* at = anchors + swizzled<kAnchors>(column, row + q * kRowStep);  // the same group for all four columns
      at[0] = z[q].x;
      at[kAnchors] = z[q].y;
      at[2 * kAnchors] = z[q].z;
      at[3 * kAnchors] = z[q].w;
    }
#pragma unroll
    for (int q = 0; q < kRowLoads; ++q) {
      const float4 r = affine4(shared.scale, shared.shift, k + column, u[q]);
      square[q] = fmaf(r.x, r.x, fmaf(r.y, r.y, fmaf(r.z, r.z, fmaf(r.w, r.w, square[q]))));
      float* at = tile + swizzled<kTile>(column, row + q * kRowStep);
      at[0] = r.x;
      at[kTile] = r.y;
      at[2 * kTile] = r.z;
      at[3 * kTile] = r.w;
    }
  };

  load(0);
  for (int k = 0; k < D; k += kDepth) {
    store(k);
    __syncthreads();
    if (k + kDepth < D) load(k + kDepth);
#pragma unroll 8
    for (int c = 0; c < kDepth; ++c) {
      float a[kSquare];
      const float* anchor = anchors + swizzled<kAnchors>(c, kSquare * y);
      if constexpr (kSquare == 4) {
        const float4 v = *reinterpret_cast<const float4*>(anchor);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
      } else {
        const float2 v = *reinterpret_cast<const float2*>(anchor);
        a[0] = v.x, a[1] = v.y;
      }
      const float4 r = *reinterpret_cast<const float4*>(tile + swizzled<kTile>(c, 4 * x));
#pragma unroll
      for (int i = 0; i < kSquare; ++i) {
        dot[i][0] = fmaf(a[i], r.x, dot[i][0]);
        dot[i][1] = fmaf(a[i], r.y, dot[i][1]);
        dot[i][2] = fmaf(a[i], r.z, dot[i][2]);
        dot[i][3] = fmaf(a[i], r.w, dot[i][3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int q = 0; q < kRowLoads; ++q) {
    for (int step = 1; step < kDepth / 4; step *= 2) square[q] += __shfl_xor_sync(0xffffffffu, square[q], step);
    const float norm = sqrtf(square[q]), eps = static_cast<float>(p.eps);
    if (column == 0) shared.inverse_norm[row + q * kRowStep] = p.renormalize ? 1.0f / (norm < eps ? eps : norm) : 1.0f;
  }
  __syncthreads();
}

// Phase 2: scores the pairs, adds up their values, and leaves the weights of the rows with an active pair in shared
// memory. Returns how many rows those are.
template <int kDim, typename Loss>
__device__ __forceinline__ int score_tile(Shared<kDim>& shared, const Loss& loss, int64_t begin, int rows, Kind kind,
                                          float (&dot)[Shape<kDim>::kSquare][4], float (&value)[Shape<kDim>::kSquare],
                                          int (&active)[Shape<kDim>::kSquare]) {
  constexpr int kAnchors = Shape<kDim>::kAnchors, kSquare = Shape<kDim>::kSquare;
  const int thread = threadIdx.x, x = thread % kSide, y = thread / kSide;
  float inverse_norm[4];
  int64_t label[4];
  bool any[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    inverse_norm[j] = shared.inverse_norm[4 * x + j];
    label[j] = shared.labels[4 * x + j];
  }
#pragma unroll
  for (int i = 0; i < kSquare; ++i) {
    const Anchor anchor = shared.anchors[kSquare * y + i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 4 * x + j;
      Pair<float> pair = {0.0f, 0.0f};
      if (row < rows) pair = score_pair(loss, anchor, begin + row, label[j], dot[i][j] * inverse_norm[j], kind);
      value[i] += pair.value;
      active[i] += pair.weight != 0.0f;
      any[j] |= pair.weight != 0.0f;
      dot[i][j] = pair.weight * inverse_norm[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned lanes = __ballot_sync(0xffffffffu, any[j]);  // two rows of 16 threads
    if (thread % kWarp == 0) shared.active[thread / kWarp][j] = (lanes | lanes >> kSide) & 0xffffu;
  }
  __syncthreads();

  int before = 0;  // active rows of lower j
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unsigned columns = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) columns |= shared.active[warp][j];
    if (columns >> x & 1u) {
      const int place = before + __popc(columns & ((1u << x) - 1u));
      if (y == 0) shared.list[place] = 4 * x + j;
      const int group = ((kSquare * y >> 2) ^ place) & (kAnchors / 4 - 1);
      float* at = shared.weights + place * kAnchors + 4 * group + (kSquare * y & 3);
      if constexpr (kSquare == 4)
        *reinterpret_cast<float4*>(at) = make_float4(dot[0][j], dot[1][j], dot[2][j], dot[3][j]);
      else
        *reinterpret_cast<float2*>(at) = make_float2(dot[0][j], dot[1][j]);
    }
    before += __popc(columns);
  }
  __syncthreads();
  return before;
}

// Phase 3: grad += weights of the n listed rows times those rows. This thread's part: anchors kRows * group + i,
// columns kChunk * c + 4 * lane + (x, y, z, w).
template <int kDim>
__device__ __forceinline__ void add_gradient(const MemoryLossParams<float, float>& p, Shared<kDim>& shared,
                                             int64_t begin, int n, bool wide,
                                             float4 (&grad)[Shape<kDim>::kChunks][Shape<kDim>::kRows]) {
  using Sizes = Shape<kDim>;
  const int thread = threadIdx.x, lane = thread % Sizes::kLanes, group = thread / Sizes::kLanes;
  const int D = static_cast<int>(p.D);
  float* tile = shared.operands;  // [kDepth][kChunk]
  for (int first = 0; first < n; first += kDepth) {
    const int rows = n - first < kDepth ? n - first : kDepth;
#pragma unroll
    for (int c = 0; c < Sizes::kChunks; ++c) {
      const int column = c * Sizes::kChunk + 4 * lane;
      if (c * Sizes::kChunk >= D) break;
#pragma unroll
      for (int q = 0; q < kDepth; q += Sizes::kGroups) {
        const int k = q + group;
        if (k >= rows) continue;
        const float4 u = load4(p.bank + (begin + shared.list[first + k]) * p.D, column, D, wide);
        *reinterpret_cast<float4*>(tile + k * Sizes::kChunk + 4 * lane) =
            affine4(shared.scale, shared.shift, column, u);
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < rows; ++k) {
        const float4 r = *reinterpret_cast<const float4*>(tile + k * Sizes::kChunk + 4 * lane);
#pragma unroll
        for (int i = 0; i < Sizes::kRows; i += 4) {
          const int four = ((Sizes::kRows * group + i >> 2) ^ (first + k)) & (Sizes::kAnchors / 4 - 1);
          const float4 w = *reinterpret_cast<const float4*>(shared.weights + (first + k) * Sizes::kAnchors + 4 * four);
          const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float4& sum = grad[c][i + e];
            sum.x = fmaf(weight[e], r.x, sum.x);
            sum.y = fmaf(weight[e], r.y, sum.y);
            sum.z = fmaf(weight[e], r.z, sum.z);
            sum.w = fmaf(weight[e], r.w, sum.w);
          }
        }
      }
      __syncthreads();
    }
  }
}

template <int kDim, typename Loss>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    sweep_kernel(const MemoryLossParams<float, float> p, const Loss loss, const PartialLoss<float> partial, bool wide) {
  using Sizes = Shape<kDim>;
  __shared__ Shared<kDim> shared;
  const int thread = threadIdx.x, x = thread % kSide, y = thread / kSide;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.x) * Sizes::kAnchors;
  const Kind kind = partial.kinds == 1 ? kBoth : static_cast<Kind>(blockIdx.z);
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
  const int dim = padded_dim(D), anchors = dim <= 512 ? 64 : 32, resident = multiprocessors * (dim <= 128 ? 2 : 1);
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
