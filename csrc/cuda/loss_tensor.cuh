// The two products of the sweep on tensor cores, from compute capability 8.0 on, to the digits of float: mma.cuh. How the
// eight warps of a block share the work:
//
//   1 similarities  bands of 16 anchors x strips of rows: with 64 anchors, 4 x 2 warps of 16 x 32. Operands as rows of
//                   kDepth columns in shared memory, in two sets: one is read while the other is filled.
//   3 gradient      every warp takes all anchors and an eighth of the columns of a chunk: with D = 512, 16 columns of each
//                   of 4 chunks, 128 sums a thread
//
// Sums of a few columns, or rows, are added up by the tensor cores, which cut off; then they are added to the rest as
// floats are.
#pragma once

#include "loss_tile.cuh"
#include "mma.cuh"

namespace xbn::cuda {
namespace {

template <int kDim>
class TensorProducts {
  using Sizes = Shape<kDim>;
  static constexpr int kAnchors = Sizes::kAnchors, kSquare = Sizes::kSquare;
  static constexpr int kChunk = Sizes::kChunk, kChunks = Sizes::kChunks;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kBands = kAnchors / 16, kStrips = kWarps / kBands;
  static constexpr int kStripTiles = kTile / kStrips / 8;    // of eight rows
  static constexpr int kColumns = kChunk / kWarps;           // of a warp in a chunk
  static constexpr int kColumnTiles = kColumns / 8;          // of eight
  static constexpr int kSet = (kAnchors + kTile) * kDepth;   // floats of a set of operands
  static_assert(2 * kSet <= Shared<kDim>::kOperands + kTile * kAnchors);
  static_assert(kDepth * kChunk <= Shared<kDim>::kOperands && kTile * kAnchors <= Shared<kDim>::kOperands);

 public:
  // Phase 1: dot[i][j] = anchor kSquare * y + i times row 4 * x + j of the tile, and the rows' inverse norms.
  static __device__ __forceinline__ void similarities(const MemoryLossParams<float, float>& p, Shared<kDim>& shared,
                                                      int64_t first_anchor, int64_t begin, int rows, bool wide,
                                                      float (&dot)[kSquare][4]) {
    const int band = warp() % kBands, strip = warp() / kBands, D = static_cast<int>(p.D);
    const auto set = [&](int k) { return shared.products + k / kDepth % 2 * kSet; };  // of operands
    StagedRows staged(p, begin, rows, wide);
    const auto load = [&](int k) {
#pragma unroll
      for (int q = 0; q < kAnchors / Staging::kStep; ++q) {
        const int64_t i = first_anchor + Staging::row(q);
        const int column = k + Staging::column();
        copy4_async(set(k) + in_row(Staging::row(q), Staging::column() / 4), p.z + i * p.D + column,
                    i < p.B ? D - column : 0, wide);
      }
      staged.load(k);
    };
    const auto store = [&](int k) {
      staged.store(shared, k, [&](int row, int column, float4 four) {
        *reinterpret_cast<float4*>(set(k) + kAnchors * kDepth + in_row(row, column / 4)) = four;
      });
      wait_for_copies();
    };
    float s[kStripTiles][4] = {};
    load(0);
    store(0);
    __syncthreads();
    for (int k = 0; k < D; k += kDepth) {
      if (k + kDepth < D) load(k + kDepth);
      const float* anchors = set(k);
      const float* tile = anchors + kAnchors * kDepth;
      float part[kStripTiles][4] = {};
      // A lane takes four neighbouring columns of its rows, for two products: the order of columns is the same for
      // anchors and rows, and of no matter to the sum.
#pragma unroll 1  // or the compiler loads both halves first, and spills
      for (int half = 0; half < 2; ++half) {
        const float4 upper = four_of(anchors, 16 * band + g(), 4 * half + t());
        const float4 lower = four_of(anchors, 16 * band + g() + 8, 4 * half + t());
        Split<4> a[2];
        a[0].set(0, upper.x), a[0].set(1, lower.x), a[0].set(2, upper.y), a[0].set(3, lower.y);
        a[1].set(0, upper.z), a[1].set(1, lower.z), a[1].set(2, upper.w), a[1].set(3, lower.w);
#pragma unroll
        for (int n = 0; n < kStripTiles; ++n) {
          const float4 row = four_of(tile, 8 * (kStripTiles * strip + n) + g(), 4 * half + t());
          Split<2> b[2];
          b[0].set(0, row.x), b[0].set(1, row.y);
          b[1].set(0, row.z), b[1].set(1, row.w);
          multiply_add(part[n], a[0], b[0]);
          multiply_add(part[n], a[1], b[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kStripTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] += part[n][e];
      if (k + kDepth < D) store(k + kDepth);
      __syncthreads();
    }
    // Through shared memory to the threads that score them.
    float* square = shared.operands();  // [kAnchors][kTile]
#pragma unroll
    for (int n = 0; n < kStripTiles; ++n) {
      const int column = 8 * (kStripTiles * strip + n) + 2 * t();
      *reinterpret_cast<float2*>(square + in_square(16 * band + g(), column)) = make_float2(s[n][0], s[n][1]);
      *reinterpret_cast<float2*>(square + in_square(16 * band + g() + 8, column)) = make_float2(s[n][2], s[n][3]);
    }
    staged.store_inverse_norms(shared);
    __syncthreads();
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
    for (int i = 0; i < kSquare; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(square + in_square(kSquare * y + i, 4 * x));
      dot[i][0] = four.x, dot[i][1] = four.y, dot[i][2] = four.z, dot[i][3] = four.w;
    }
  }

  __device__ __forceinline__ TensorProducts() {
    each([](float& sum, int, int) { sum = 0; });
  }

  __device__ __forceinline__ void rescale(const float* by_anchor) {
    each([&](float& sum, int anchor, int) { sum *= by_anchor[anchor]; });
  }

  // Phase 3: the sum += weights of the n listed rows times those rows.
  __device__ __forceinline__ void add(const MemoryLossParams<float, float>& p, Shared<kDim>& shared, int64_t begin,
                                      int n, bool wide) {
    constexpr int kLanes = kChunk / 4, kGroups = kThreads / kLanes;  // threads side by side and below each other
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, D = static_cast<int>(p.D);
    // The rows of a product are eight: what is missing must be zero on both sides.
    for (int k = n * kAnchors + threadIdx.x; k < round_up(n) * kAnchors; k += kThreads) shared.weights()[k] = 0;
    float* tile = shared.operands();  // [kDepth][kChunk]
    for (int first = 0; first < n; first += kDepth) {
      const int rows = n - first < kDepth ? n - first : kDepth;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (c * kChunk >= D) break;
#pragma unroll
        for (int q = 0; q < kDepth; q += kGroups) {
          const int k = q + group, column = c * kChunk + 4 * lane;
          if (k >= round_up(rows)) continue;
          float4 r = make_float4(0, 0, 0, 0);
          if (k < rows)
            r = affine4(shared.scale, shared.shift, column,
                        load4(p.bank + (begin + shared.list[first + k]) * p.D, column, D, wide));
          *reinterpret_cast<float4*>(tile + in_chunk(k, 4 * lane)) = r;
        }
        __syncthreads();
        float part[kBands][kColumnTiles][4] = {};
#pragma unroll 1
        for (int k = 0; k < rows; k += 8) {
          Split<2> b[kColumnTiles];
#pragma unroll
          for (int m = 0; m < kColumnTiles; ++m) {
            const int column = kColumns * warp() + 8 * m + g();
            b[m].set(0, tile[in_chunk(k + t(), column)]);
            b[m].set(1, tile[in_chunk(k + t() + 4, column)]);
          }
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
            Split<4> a;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int anchor = 16 * band + g() + e % 2 * 8, place = first + k + t() + e / 2 * 4;
              a.set(e, shared.weights()[weight_at<kAnchors>(place, anchor / 4) + anchor % 4]);
            }
#pragma unroll
            for (int m = 0; m < kColumnTiles; ++m) multiply_add(part[band][m], a, b[m]);
          }
        }
#pragma unroll
        for (int band = 0; band < kBands; ++band)
#pragma unroll
          for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum_[c][band][m][e] += part[band][m][e];
        __syncthreads();
      }
    }
  }

  // The sum, to `grad` [anchors of the block that exist, D].
  __device__ __forceinline__ void store(float* grad, int64_t anchors, int64_t D, bool wide) {
    if (!wide) {
      each([&](float& sum, int anchor, int column) {
        if (anchor < anchors && column < D) grad[anchor * D + column] = sum;
      });
      return;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const int anchor = anchor_of(band, e), column = column_of(c, m, e);
            if (anchor < anchors && column < D)
              *reinterpret_cast<float2*>(grad + anchor * D + column) =
                  make_float2(sum_[c][band][m][e], sum_[c][band][m][e + 1]);
          }
  }

 private:
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static __device__ __forceinline__ int g() { return static_cast<int>(threadIdx.x) % kWarp / 4; }
  static __device__ __forceinline__ int t() { return static_cast<int>(threadIdx.x) % 4; }
  static __device__ __forceinline__ int round_up(int rows) { return (rows + 7) / 8 * 8; }

  // Operands [rows][kDepth]: every other row has its halves swapped, for the eight lanes that read together are two rows
  // times four groups.
  static __device__ __forceinline__ int in_row(int row, int group) {
    return row * kDepth + 4 * (group ^ (row & 1) << 2);
  }
  static __device__ __forceinline__ float4 four_of(const float* operand, int row, int group) {
    return *reinterpret_cast<const float4*>(operand + in_row(row, group));
  }

  // Similarities [kAnchors][kTile] and rows of the gradient [kDepth][kChunk]: groups of eight are swapped within 32.
  static __device__ __forceinline__ int in_square(int anchor, int row) {
    return anchor * kTile + (row ^ (anchor & 3) << 3);
  }
  static __device__ __forceinline__ int in_chunk(int row, int column) {
    return row * kChunk + (column ^ (row & 3) << 3);
  }

  static __device__ __forceinline__ int anchor_of(int band, int e) { return 16 * band + g() + e / 2 * 8; }
  static __device__ __forceinline__ int column_of(int c, int m, int e) {
    return c * kChunk + kColumns * warp() + 8 * m + 2 * t() + e % 2;
  }

  // Calls f(sum, anchor of the block, column) for all sums of this thread.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) f(sum_[c][band][m][e], anchor_of(band, e), column_of(c, m, e));
  }

  float sum_[kChunks][kBands][kColumnTiles][4];
};

}  // namespace
}  // namespace xbn::cuda
