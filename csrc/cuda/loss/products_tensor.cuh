// The two products of the sweep on tensor cores, from compute capability 8.0 on, to the digits of float: mma.cuh. How
// the eight warps of a block share the work:
//
//   1 similarities  bands of 16 anchors x strips of rows: with 64 anchors, 4 x 2 warps of 16 x 32. Operands as rows of
//                   kDepth columns in shared memory, in two sets: one is read while the other is filled.
//   3 gradient      every warp takes all anchors and an eighth of the columns of a chunk: with D = 512, 16 columns of
//                   each of 4 chunks, 128 sums a thread
//
// Sums of a few columns, or rows, are added up by the tensor cores, which cut off; then they are added to the rest as
// floats are.
#pragma once

#include "mma.cuh"
#include "tile.cuh"

namespace xbn::cuda {
namespace {

template <int kDim>
class TensorProducts {
  using Sizes = Shape<kDim>;
  static constexpr int kAnchors = Sizes::kAnchors, kSquare = Sizes::kSquare;
  static constexpr int kChunk = Sizes::kChunk, kChunks = Sizes::kChunks;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kBands = kAnchors / 16, kStrips = kWarps / kBands;
  static constexpr int kStripTiles = kTile / kStrips / 8;   // of eight rows
  static constexpr int kColumns = kChunk / kWarps;          // of a warp in a chunk
  static constexpr int kColumnTiles = kColumns / 8;         // of eight
  static constexpr int kSet = (kAnchors + kTile) * kDepth;  // floats of a set of operands
  static_assert(2 * kSet <= Shared<kDim>::kOperands + kTile * kAnchors);
  static_assert(kDepth * kChunk <= Shared<kDim>::kOperands && kTile * kAnchors <= Shared<kDim>::kOperands);

 public:
  // Phase 1: dot[i][j] = anchor kSquare * y + i times row 4 * x + j of the tile, and the rows' inverse norms.
  template <typename S>
  static __device__ __forceinline__ void similarities(const MemoryLossParams<float, S>& p, Shared<kDim>& shared,
                                                      int64_t first_anchor, int64_t begin, int rows, bool /*wide*/,
                                                      float (&dot)[kSquare][4]) {
    const Place at;
    const int band = at.warp % kBands, strip = at.warp / kBands, D = static_cast<int>(p.D);
    const auto set = [&](int k) { return shared.products + k / kDepth % 2 * kSet; };  // of operands
    const float* z = p.z + first_anchor * p.D;
    const S* bank = p.bank + begin * p.D;
    const int anchors_left = static_cast<int>(smaller(kAnchors, p.B - first_anchor));
    const auto load = [&](int k) {
      const Place here;
      const int row = here.thread / Staging::kAcross, group = here.thread % Staging::kAcross, column = k + 4 * group;
#pragma unroll
      for (int q = 0; q < kAnchors / Staging::kStep; ++q) {
        const int i = row + q * Staging::kStep;
        copy4_async(set(k) + in_row(i, group), z + i * D + column, i < anchors_left && column < D);
      }
#pragma unroll
      for (int q = 0; q < RowNorms::kLoads; ++q) {
        const int j = row + q * Staging::kStep;
        copy4_async(reinterpret_cast<S*>(set(k) + kAnchors * kDepth + in_row(j, group)), bank + j * D + column,
                    j < rows && column < D);
      }
    };
    RowNorms norms;
    const auto map = [&](int k) {  // what this thread has loaded
      const Place here;
      const int row = here.thread / Staging::kAcross, group = here.thread % Staging::kAcross;
      wait_for_copies();
#pragma unroll
      for (int q = 0; q < RowNorms::kLoads; ++q) {
        float* four = set(k) + kAnchors * kDepth + in_row(row + q * Staging::kStep, group);
        const float4 r = affine4(shared.scale, shared.shift, k + 4 * group, four_at(reinterpret_cast<const S*>(four)));
        norms.add(q, r);
        *reinterpret_cast<float4*>(four) = r;
      }
    };
    float s[kStripTiles][4] = {};
    load(0);
    map(0);
    __syncthreads();
    for (int k = 0; k < D; k += kDepth) {
      if (k + kDepth < D) load(k + kDepth);
      const float* anchors = set(k);
      const float* tile = anchors + kAnchors * kDepth;
      float part[kStripTiles][4] = {};
      // A lane takes two neighbouring columns where the product's are t and t + 4: their order is the same for anchors
      // and rows, and of no matter to the sum.
#pragma unroll(kDim <= 128 ? 1 : 2)  // more would spill
      for (int step = 0; step < kDepth / 8; ++step) {
        const float2 upper = two_of(anchors, 16 * band + at.g, 4 * step + at.t);
        const float2 lower = two_of(anchors, 16 * band + at.g + 8, 4 * step + at.t);
        Split<4> a;
        a.set(0, upper.x), a.set(1, lower.x), a.set(2, upper.y), a.set(3, lower.y);
#pragma unroll
        for (int n = 0; n < kStripTiles; ++n) {
          const float2 row = two_of(tile, 8 * (kStripTiles * strip + n) + at.g, 4 * step + at.t);
          Split<2> b;
          b.set(0, row.x), b.set(1, row.y);
          multiply_add(part[n], a, b);
        }
      }
#pragma unroll
      for (int n = 0; n < kStripTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] += part[n][e];
      if (k + kDepth < D) map(k + kDepth);
      __syncthreads();
    }
    // Through shared memory to the threads that score them.
    float* square = shared.operands();  // [kAnchors][kTile]
#pragma unroll
    for (int n = 0; n < kStripTiles; ++n) {
      const int column = 8 * (kStripTiles * strip + n) + 2 * at.t;
      *reinterpret_cast<float2*>(square + in_square(16 * band + at.g, column)) = make_float2(s[n][0], s[n][1]);
      *reinterpret_cast<float2*>(square + in_square(16 * band + at.g + 8, column)) = make_float2(s[n][2], s[n][3]);
    }
    norms.store_inverses(p, shared.inverse_norm);
    __syncthreads();
    const int x = at.thread % kSide, y = at.thread / kSide;
#pragma unroll
    for (int i = 0; i < kSquare; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(square + in_square(kSquare * y + i, 4 * x));
      dot[i][0] = four.x, dot[i][1] = four.y, dot[i][2] = four.z, dot[i][3] = four.w;
    }
  }

  __device__ __forceinline__ TensorProducts() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum_[c][band][m][e] = 0;
  }

  __device__ __forceinline__ void rescale(const float* by_anchor) {
    const Place at;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      const float factor[2] = {by_anchor[16 * band + at.g], by_anchor[16 * band + at.g + 8]};
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum_[c][band][m][e] *= factor[e / 2];
    }
  }

  // Phase 3: the sum += weights of the n listed rows times those rows.
  template <typename S>
  __device__ __forceinline__ void add(const MemoryLossParams<float, S>& p, Shared<kDim>& shared, int64_t begin, int n,
                                      bool /*wide*/) {
    constexpr int kLanes = kChunk / 4, kGroups = kThreads / kLanes;  // threads side by side and below each other
    const Place at;
    const int lane = at.thread % kLanes, group = at.thread / kLanes;
    const int D = static_cast<int>(p.D);
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
                        load4(p.bank + (begin + shared.list[first + k]) * p.D, column, D, true));
          *reinterpret_cast<float4*>(tile + in_chunk(k, 4 * lane)) = r;
        }
        __syncthreads();
        float part[kBands][kColumnTiles][4] = {};
#pragma unroll 1
        for (int k = 0; k < rows; k += 8) {
          Split<2> b[kColumnTiles];
#pragma unroll
          for (int m = 0; m < kColumnTiles; ++m) {
            const int column = kColumns * at.warp + 8 * m + at.g;
            b[m].set(0, tile[in_chunk(k + at.t, column)]);
            b[m].set(1, tile[in_chunk(k + at.t + 4, column)]);
          }
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
            Split<4> a;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int anchor = 16 * band + at.g + e % 2 * 8, place = first + k + at.t + e / 2 * 4;
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
  __device__ __forceinline__ void store(float* grad, int64_t anchors, int64_t D, bool /*wide*/) {
    const Place at;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const int anchor = 16 * band + at.g + e / 2 * 8,
                      column = c * kChunk + kColumns * at.warp + 8 * m + 2 * at.t;
            if (anchor < anchors && column < D)
              *reinterpret_cast<float2*>(grad + anchor * D + column) =
                  make_float2(sum_[c][band][m][e], sum_[c][band][m][e + 1]);
          }
  }

 private:
  // Of this thread. Computed in each phase, in a way that hides it from the compiler: else it works out every address
  // of every phase before the first tile, and has no registers left for them.
  struct Place {
    int thread, warp, g, t;
    __device__ __forceinline__ Place() {
      thread = hidden(static_cast<int>(threadIdx.x));
      warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
    }
  };

  static __device__ __forceinline__ int round_up(int rows) { return (rows + 7) / 8 * 8; }

  // Operands [rows][kDepth]: groups of eight columns are permuted by row, for the 16 lanes that read together are four
  // rows times four pairs of columns.
  static __device__ __forceinline__ int in_row(int row, int group) {
    return row * kDepth + 4 * (group ^ (row & 3) << 1);
  }
  static __device__ __forceinline__ float2 two_of(const float* operand, int row, int pair) {
    return *reinterpret_cast<const float2*>(operand + in_row(row, pair / 2) + pair % 2 * 2);
  }

  // Similarities [kAnchors][kTile] and rows of the gradient [kDepth][kChunk]: groups of eight are swapped within 32.
  static __device__ __forceinline__ int in_square(int anchor, int row) {
    return anchor * kTile + (row ^ (anchor & 3) << 3);
  }
  static __device__ __forceinline__ int in_chunk(int row, int column) {
    return row * kChunk + (column ^ (row & 3) << 3);
  }

  // Anchors 16 * band + at.g + (0 or 8, for e / 2), columns kChunk * c + kColumns * at.warp + 8 * m + 2 * at.t + e % 2.
  float sum_[kChunks][kBands][kColumnTiles][4];
};

}  // namespace
}  // namespace xbn::cuda
