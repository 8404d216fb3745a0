// Bank rows as the tensor cores' products in fp16 take them: straight from memory to a warp's registers, some rows at a
// time and all of their columns, no warp waiting for another. For the screen and for similarities from halves.
//
// A lane's 16 bytes of a row are what it needs of a product's operand, of two products' where they hold eight values:
// the columns of a step are taken in an order of their own, the same for anchors and rows.
#pragma once

#include "../vectors.cuh"

namespace xbn::cuda {
namespace {

// A lane's load of a row is its part of as many steps, of 16 columns, as it has fours of columns.
template <typename S>
struct RowLoad {
  static constexpr int kWidth = 16 / sizeof(S);
  static constexpr int kFours = kWidth / 4;

  // The first of lane t's four columns in a step.
  static __device__ __forceinline__ int column(int step, int t) {
    return (step / kFours * 4 + t) * kWidth + step % kFours * 4;
  }
};

__device__ __forceinline__ float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Tiles of 8 * kEights rows, from one of a warp's to the next that is its own, as a lane loads them: kAhead steps at a
// time.
template <int kEights, int kAhead, int kWarps, typename S>
class RowTiles {
  static constexpr int kRows = 8 * kEights, kWidth = RowLoad<S>::kWidth;

 public:
  using Columns = Vector<S, kWidth>;

  __device__ __forceinline__ RowTiles(const S* bank, int D, int count) : tile_(first()) { begin(bank, D, count); }

  // This warp's first tile, and how far apart its others are.
  static __device__ __forceinline__ int first() {
    return static_cast<int>(threadIdx.x) / kWarp * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
  }
  static __device__ __forceinline__ int apart() { return static_cast<int>(gridDim.y) * kWarps; }
  static __device__ __forceinline__ int rows_of(int count, int tile) {
    const int left = count - tile * kRows;
    return left < 0 ? 0 : left < kRows ? left : kRows;
  }

  // Load q of those at hand: this lane's columns of rows g, 8 + g …, zeros beyond the matrix.
  __device__ __forceinline__ void load(int q, int D, Columns (&to)[kEights]) const {
    const int further = 4 * kWidth * q;
#pragma unroll
    for (int n = 0; n < kEights; ++n)
      to[n] = 8 * n + g() < rows_ && column_ + further < D
                  ? *reinterpret_cast<const Columns*>(at_ + 8 * n * D + further)
                  : Columns{};
  }

  // To the loads that follow; after the last, to the first of the next tile.
  __device__ __forceinline__ void go_on(const S* bank, int D, int count, int columns) {
    column_ += 16 * kAhead, at_ += 16 * kAhead;
    if (column_ < columns) return;
    tile_ += apart();
    begin(bank, D, count);
  }

 private:
  static __device__ __forceinline__ int g() { return static_cast<int>(threadIdx.x) % kWarp / 4; }

  __device__ __forceinline__ void begin(const S* bank, int D, int count) {
    column_ = static_cast<int>(threadIdx.x) % 4 * kWidth;
    rows_ = rows_of(count, tile_);
    at_ = bank + (static_cast<int64_t>(tile_) * kRows + g()) * D + column_;
  }

  const S* at_;
  int tile_, rows_, column_;
};

}  // namespace
}  // namespace xbn::cuda
