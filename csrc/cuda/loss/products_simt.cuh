// The two products of the sweep in float32, by ordinary arithmetic: on every GPU, and to the last digits of float. How
// the 256 threads of a block share the work:
//
//   1 similarities  threads as a square of 16 x 16, 4 anchors x 4 rows each (2 x 4 above D = 512)
//   3 gradient      threads side by side on the columns, four each, and below each other on the anchors: with D = 512,
//                   32 x 8 threads, each with 8 anchors x 4 chunks x 4 columns of the sum in registers
#pragma once

#include "tile.cuh"

namespace xbn::cuda {
namespace {

template <int kDim>
class SimtProducts {
  using Sizes = Shape<kDim>;
  static constexpr int kAnchors = Sizes::kAnchors, kSquare = Sizes::kSquare;
  static constexpr int kChunk = Sizes::kChunk, kChunks = Sizes::kChunks;
  static constexpr int kLanes = kChunk / 4;          // threads side by side on the columns
  static constexpr int kGroups = kThreads / kLanes;  // and below each other on the anchors
  static constexpr int kRows = kAnchors / kGroups;   // anchors of a thread

 public:
  // Phase 1: dot[i][j] = anchor kSquare * y + i times row 4 * x + j of the tile, and the rows' inverse norms.
  template <typename S>
  static __device__ __forceinline__ void similarities(const MemoryLossParams<float, S>& p, Shared<kDim>& shared,
                                                      int64_t first_anchor, int64_t begin, int rows, bool wide,
                                                      float (&dot)[kSquare][4]) {
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide, D = static_cast<int>(p.D);
    float* anchors = shared.operands();
    float* tile = anchors + kDepth * kTile;
    constexpr int kAnchorLoads = kAnchors / Staging::kStep;
    const S* bank = p.bank + begin * p.D;
    RowNorms norms;
    float4 z[kAnchorLoads], u[RowNorms::kLoads];
    const auto load = [&](int k) {
#pragma unroll
      for (int q = 0; q < kAnchorLoads; ++q) {
        const int64_t i = first_anchor + Staging::row(q);
        z[q] = i < p.B ? load4(p.z + i * p.D, k + Staging::column(), D, wide) : zeros4();
      }
#pragma unroll
      for (int q = 0; q < RowNorms::kLoads; ++q) {
        const int j = Staging::row(q);
        u[q] = j < rows ? load4(bank + j * D, k + Staging::column(), D, wide) : make_float4(0, 0, 0, 0);
      }
    };
    load(0);
    for (int k = 0; k < D; k += kDepth) {
#pragma unroll
      for (int q = 0; q < kAnchorLoads; ++q) put_across<kAnchors>(anchors, Staging::row(q), Staging::column(), z[q]);
#pragma unroll
      for (int q = 0; q < RowNorms::kLoads; ++q) {
        const float4 r = affine4(shared.scale, shared.shift, k + Staging::column(), u[q]);
        norms.add(q, r);
        put_across<kTile>(tile, Staging::row(q), Staging::column(), r);
      }
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
    norms.store_inverses(p, shared.inverse_norm);
    __syncthreads();
  }

  __device__ __forceinline__ SimtProducts() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum_[c][i] = make_float4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void rescale(const float* by_anchor) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float factor = by_anchor[kRows * group() + i];
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        sum_[c][i] =
            make_float4(sum_[c][i].x * factor, sum_[c][i].y * factor, sum_[c][i].z * factor, sum_[c][i].w * factor);
    }
  }

  // Phase 3: the sum += weights of the n listed rows times those rows.
  template <typename S>
  __device__ __forceinline__ void add(const MemoryLossParams<float, S>& p, Shared<kDim>& shared, int64_t begin, int n,
                                      bool wide) {
    const int D = static_cast<int>(p.D);
    float* tile = shared.operands();  // [kDepth][kChunk]
    for (int first = 0; first < n; first += kDepth) {
      const int rows = n - first < kDepth ? n - first : kDepth;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = c * kChunk + 4 * lane();
        if (c * kChunk >= D) break;
#pragma unroll
        for (int q = 0; q < kDepth; q += kGroups) {
          const int k = q + group();
          if (k >= rows) continue;
          const float4 u = load4(p.bank + (begin + shared.list[first + k]) * p.D, column, D, wide);
          *reinterpret_cast<float4*>(tile + k * kChunk + 4 * lane()) = affine4(shared.scale, shared.shift, column, u);
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < rows; ++k) {
          const float4 r = *reinterpret_cast<const float4*>(tile + k * kChunk + 4 * lane());
#pragma unroll
          for (int i = 0; i < kRows; i += 4) {
            const float4 w = *reinterpret_cast<const float4*>(shared.weights() +
                                                              weight_at<kAnchors>(first + k, kRows * group() + i >> 2));
            const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float4& sum = sum_[c][i + e];
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

  // The sum, to `grad` [anchors of the block that exist, D].
  __device__ __forceinline__ void store(float* grad, int64_t anchors, int64_t D, bool wide) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t anchor = kRows * group() + i, column = c * kChunk + 4 * lane();
        if (anchor >= anchors || column >= D) continue;
        float* at = grad + anchor * D + column;
        if (wide) {
          *reinterpret_cast<float4*>(at) = sum_[c][i];
          continue;
        }
        const float four[4] = {sum_[c][i].x, sum_[c][i].y, sum_[c][i].z, sum_[c][i].w};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (column + e < D) at[e] = four[e];
      }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / kLanes; }

  // An operand [kDepth][kWidth] in shared memory, column k of all rows side by side. Groups of four rows are swapped by
  // column, so that neither writing a row nor reading a column meets in one of the banks of shared memory.
  template <int kWidth>
  static __device__ __forceinline__ int swizzled(int k, int row) {
    constexpr int kGroupsOfFour = kWidth / 4;
    return k * kWidth + ((((row >> 2) ^ (k >> 2)) & (kGroupsOfFour - 1)) << 2) + (row & 3);
  }

  // Four columns of a row: the same group for all four.
  template <int kWidth>
  static __device__ __forceinline__ void put_across(float* operand, int row, int column, float4 four) {
    float* at = operand + swizzled<kWidth>(column, row);
    at[0] = four.x;
    at[kWidth] = four.y;
    at[2 * kWidth] = four.z;
    at[3 * kWidth] = four.w;
  }

  float4 sum_[kChunks][kRows];  // anchors kRows * group() + i, columns kChunk * c + 4 * lane() + (x, y, z, w)
};

}  // namespace
}  // namespace xbn::cuda
