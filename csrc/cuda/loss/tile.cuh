// What both kinds of sweep have in common: the shape of a block, what it keeps in shared memory, and how a thread takes
// its share of the operands from global memory there. The two products of a tile, phases 1 and 3, are in
// products_simt.cuh and products_tensor.cuh; phase 2 is in score.cuh; sweep.cu says how they fit together.
#pragma once

#include "../vectors.cuh"
#include "anchor.cuh"

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
  static constexpr int kBlocks = blocks_at_once(kDim);
};

// Columns k … k + 3 of a row, zero beyond D.
template <typename S>
__device__ __forceinline__ float4 load4(const S* row, int k, int D, bool wide) {
  if (wide) return k < D ? four_at(row + k) : zeros4();
  const auto at = [&](int d) { return d < D ? as<float>(row[d]) : 0.0f; };
  return make_float4(at(k), at(k + 1), at(k + 2), at(k + 3));
}

template <int kDim>
struct Shared {
  static constexpr int kAnchors = Shape<kDim>::kAnchors;

  static constexpr int kOperands = 2 * kDepth * kTile;

  // Operands of a product: anchors and rows, or the gradient's rows; and behind them the weights, which phase 1 does
  // not need: there the tensor cores' sweep has a second set of operands.
  alignas(16) float products[kOperands + kTile * kAnchors];
  alignas(16) float scale[kDim];
  alignas(16) float shift[kDim];
  int64_t end;  // of this block's share of the bank
  Slot slot;    // of the pass, that this block fills
  Anchor<float> anchors[kAnchors];
  RowSums sums[kAnchors];
  float rescale[kAnchors];  // of the gradient so far, as exponents have grown
  int64_t labels[kTile];
  int64_t ids[kTile];
  float inverse_norm[kTile];
  unsigned active[kThreads / kWarp][4];  // by warp: which of the columns 4 x + j have an active pair, a bit for each x
  int list[kTile];                       // the rows of the tile with an active pair

  __device__ __forceinline__ float* operands() { return products; }
  __device__ __forceinline__ float* weights() { return products + kOperands; }  // [active row][anchor], see weight_at()
};

// Where the weights of anchors 4 * group … 4 * group + 3 and the active row at `place` are. Groups are permuted by
// place: neither the scores' writing, the same group at eight places that follow each other, nor the tensor cores'
// reading, two groups at four places, meets in one of the banks of shared memory.
template <int kAnchors>
__device__ __forceinline__ int weight_at(int place, int group) {
  const int permuted = group ^ (((place & 3) << 1 | (place >> 2 & 1) | (place & 8)) & (kAnchors / 4 - 1));
  return place * kAnchors + 4 * permuted;
}

// The threads' places as they bring kDepth columns of an operand to shared memory: four columns of some rows each.
struct Staging {
  static constexpr int kAcross = kDepth / 4, kStep = kThreads / kAcross;  // threads side by side, and below each other

  static __device__ __forceinline__ int row(int q) { return static_cast<int>(threadIdx.x) / kAcross + q * kStep; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % kAcross * 4; }
};

// The squares of a tile's rows, as their columns come by.
class RowNorms {
 public:
  static constexpr int kLoads = kTile / Staging::kStep;  // rows of a thread

  __device__ __forceinline__ void add(int q, float4 r) {
    square_[q] = fmaf(r.x, r.x, fmaf(r.y, r.y, fmaf(r.z, r.z, fmaf(r.w, r.w, square_[q]))));
  }

  // After all columns: what the rows' similarities are to be multiplied by.
  __device__ __forceinline__ void store_inverses(const RankParams<float>& p, float* inverse_norm) {
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      for (int step = 1; step < Staging::kAcross; step *= 2)
        square_[q] += __shfl_xor_sync(0xffffffffu, square_[q], step);
      const float norm = sqrtf(square_[q]), eps = static_cast<float>(p.eps);
      if (Staging::column() == 0) inverse_norm[Staging::row(q)] = p.renormalize ? inverse_length(norm, eps) : 1.0f;
    }
  }

 private:
  float square_[kLoads] = {};
};

}  // namespace
}  // namespace xbn::cuda
