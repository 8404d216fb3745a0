// How kernels add up the columns of a matrix: a block has eight of them and all rows, so that a sum needs no other
// block.
//
// A row of a batch counts as a whole or not at all. A warp to a row finds out which do, in a launch of its own, and
// leaves a flag for each; the blocks of the next launch read them all. Two launches take less than one whose last block
// merges what the others leave: that block is alone, and reads it column by column.
#pragma once

#include "../math/half.h"
#include "device.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = kWarps;       // of a block: in the end there is a warp to each
constexpr int kChunk = kWarp * kWarp;  // rows at a time: as many words of flags as a warp has lanes
constexpr int kWide = 4;               // columns of a thread where D and the addresses allow it, else one

// What a thread of such a block has: kAcross threads are side by side on the columns, each takes every kDeep'th row.
template <int kWidth>
struct Tile {
  static constexpr int kAcross = kColumns / kWidth, kDeep = kThreads / kAcross;

  __device__ __forceinline__ static int first_row() { return static_cast<int>(threadIdx.x) / kAcross; }
  __device__ __forceinline__ static int64_t first_column() {
    return static_cast<int64_t>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x) % kAcross * kWidth;
  }
};

// The column that this warp is given in the end.
__device__ __forceinline__ int64_t column_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x / kWarp;
}

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// Whether passes(value, column) is true of all of a row, by a full warp; the same in every lane.
template <int kWidth, typename T, typename F>
__device__ __forceinline__ bool all_of_row(const T* row, int64_t D, const F& passes) {
  constexpr int kBatch = 4;  // vectors of a lane in flight
  const int64_t lane = threadIdx.x % kWarp * kWidth;
  bool all = true;
  for (int64_t first = 0; first < D; first += kBatch * kWarp * kWidth) {
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
      const int64_t d = first + q * kWarp * kWidth + lane, at = d < D ? d : 0;  // no branch, so the loads overlap
      const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(row + at);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) all &= passes(values.value[c], at + c);
    }
  }
  return __all_sync(0xffffffffu, all);
}

// The flags of one chunk, as each warp holds them: a lane has those of 32 rows.
class Flags {
 public:
  // Those of rows [begin, begin + kChunk), on their way.
  class Read {
   public:
    __device__ __forceinline__ Read(const uint8_t* flags, int64_t begin, int64_t B) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        const int64_t i = begin + q * kThreads + threadIdx.x;
        flag_[q] = i < B ? flags[i] : 0;
      }
    }

   private:
    friend class Flags;
    static constexpr int kCount = kChunk / kThreads;
    uint8_t flag_[kCount];
  };

  // By all threads of the block. `words` is shared memory; a block that comes here again needs a barrier in between, or
  // other words.
  __device__ __forceinline__ Flags(const Read& read, unsigned (&words)[kWarp]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int q = 0; q < Read::kCount; ++q) {
      const unsigned word = __ballot_sync(0xffffffffu, read.flag_[q]);
      if (lane == 0) words[q * kWarps + threadIdx.x / kWarp] = word;
    }
    __syncthreads();
    word_ = words[lane];
    int up_to = __popc(word_);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int left = __shfl_up_sync(0xffffffffu, up_to, step);
      if (lane >= step) up_to += left;
    }
    before_ = up_to - __popc(word_);
    total_ = __shfl_sync(0xffffffffu, up_to, kWarp - 1);
  }

  __device__ __forceinline__ int total() const { return total_; }

  // The first row with a flag, if there is one.
  __device__ __forceinline__ int first() const {
    const int lane = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, word_ != 0))) - 1;
    return lane * kWarp + __ffs(static_cast<int>(__shfl_sync(0xffffffffu, word_, lane))) - 1;
  }

  // By full warps, each lane with a row of its own: whether it has a flag,
  __device__ __forceinline__ bool has(int row) const {
    return __shfl_sync(0xffffffffu, word_, row / kWarp) >> row % kWarp & 1u;
  }

  // and how many rows before it have one; -1 for a row without.
  __device__ __forceinline__ int rank(int row) const {
    const unsigned word = __shfl_sync(0xffffffffu, word_, row / kWarp), bit = 1u << row % kWarp;
    const int before = __shfl_sync(0xffffffffu, before_, row / kWarp);
    return word & bit ? before + __popc(word & (bit - 1)) : -1;
  }

 private:
  unsigned word_;
  int before_, total_;  // flags of the lanes before this one, and of all
};

struct ColumnSums {
  double sum, sum_squares;
};

// What the threads of a block have added up becomes the sums of this warp's column, in all of its lanes. Once a kernel.
template <int kWidth>
__device__ __forceinline__ ColumnSums sum_columns(const double (&sum)[kWidth], const double (&sum_squares)[kWidth]) {
  constexpr int kDeep = Tile<kWidth>::kDeep, kAcross = Tile<kWidth>::kAcross;
  __shared__ double partial[2][kColumns][kDeep + 2];  // two more: threads side by side are in different banks
  const int thread = threadIdx.x, lane = thread % kWarp, column = thread / kWarp;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    partial[0][thread % kAcross * kWidth + c][thread / kAcross] = sum[c];
    partial[1][thread % kAcross * kWidth + c][thread / kAcross] = sum_squares[c];
  }
  __syncthreads();
  ColumnSums all = {partial[0][column][lane], partial[1][column][lane]};
#pragma unroll
  for (int k = lane + kWarp; k < kDeep; k += kWarp) {
    all.sum += partial[0][column][k];
    all.sum_squares += partial[1][column][k];
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    all.sum += __shfl_xor_sync(0xffffffffu, all.sum, step);
    all.sum_squares += __shfl_xor_sync(0xffffffffu, all.sum_squares, step);
  }
  return all;
}

}  // namespace
}  // namespace xbn::cuda
