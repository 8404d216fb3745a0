// The two products of the sweep over one tile of bank rows, phases 1 and 3, and what a block keeps in shared memory. loss.cu
// says how the phases fit together; here is how the 256 threads of a block share the work of each.
//
//   1 similarities  threads as a square of 16 x 16, 4 anchors x 4 rows each (2 x 4 above D = 512)
//   2 scores        the same square, on the similarities it has in registers: loss_score.cuh
//   3 gradient      threads side by side on the columns, four each, and below each other on the anchors: with D = 512,
//                   32 x 8 threads, each with 8 anchors x 4 chunks x 4 columns of the sum in registers
#pragma once

#include "loss_partial.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // bank rows
constexpr int kDepth = 32;  // columns of the operands, or rows of the gradient's, in shared memory at a time
constexpr int kSide = 16;   // the threads as a square, for the similarities

constexpr int anchors_of_block(int dim) { return dim <= 512 ? 64 : 32; }
constexpr int blocks_at_once(int dim) {
  return dim <= 128 ? 2 : 1;
}  // on a multiprocessor (one on sm_75: shared memory)

// How kDim columns (D, rounded up to one of five sizes) are spread over a block.
template <int kDim>
struct Shape {
  static constexpr int kAnchors = anchors_of_block(kDim);
  static constexpr int kSquare = kAnchors / kSide;        // anchors of a thread, similarities
  static constexpr int kChunk = kDim < 128 ? kDim : 128;  // columns that the threads cover side by side, gradient
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kLanes = kChunk / 4;          // threads side by side
  static constexpr int kGroups = kThreads / kLanes;  // and below each other
  static constexpr int kRows = kAnchors / kGroups;   // anchors of a thread, gradient
  static constexpr int kBlocks = blocks_at_once(kDim);
};

// An operand [kDepth][kWidth] in shared memory, column k of all rows side by side. Groups of four rows are swapped by
// column, so that neither writing a row nor reading a column meets in one of the banks of shared memory.
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
  Slot slot;  // of the pass, that this block fills
  Anchor<float> anchors[kAnchors];
  RowSums sums[kAnchors];
  float rescale[kAnchors];  // of the gradient so far, as exponents have grown
  int64_t labels[kTile];
  int64_t ids[kTile];
  float inverse_norm[kTile];
  unsigned active[kThreads / kWarp][4];  // by warp: which of the columns 4 x + j have an active pair, a bit for each x
  int list[kTile];                       // the rows of the tile with an active pair
};

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

}  // namespace
}  // namespace xbn::cuda
