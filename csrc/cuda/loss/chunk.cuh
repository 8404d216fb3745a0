// The pairs of a block's anchors with a chunk of the bank, in the composite way: score_block.cuh says what is asked of
// them.
#pragma once

#include "score_block.cuh"

namespace xbn::cuda {
namespace {

template <typename T, int kAnchorsOfBlock>
struct ChunkPairs {
  static constexpr int kAnchors = kAnchorsOfBlock;

  Anchor<T> anchors[kAnchors];
  int64_t first_anchor, B;  // anchors from the first on, of how many
  int64_t columns, rows;    // of the chunk; only the first `rows` exist
  int64_t first_row;        // of the bank
  const int64_t *bank_labels, *bank_ids;
  const T* s;  // [kAnchors, columns] of these anchors

  __device__ __forceinline__ ChunkPairs(const MemoryLossParams<T, T>& p, const PartialLoss<T>& partial, int64_t first,
                                        int64_t chunk, const T* of_all)  // [B, chunk]
      : first_anchor(static_cast<int64_t>(blockIdx.x) * kAnchors),
        B(p.B),
        columns(chunk),
        rows(smaller(chunk, stored_rows(p.count, p.M) - first)),
        first_row(first),
        bank_labels(p.bank_labels),
        bank_ids(p.bank_ids),
        s(of_all + first_anchor * chunk) {
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) {
      const int64_t i = smaller(first_anchor + a, B - 1);
      anchors[a] = {p.labels[i], excluded_id(p, i), partial.given[i], partial.state[i]};
    }
  }

  __device__ __forceinline__ bool has(int a) const { return first_anchor + a < B; }
  __device__ __forceinline__ bool exists(int64_t j) const { return j < rows; }
  __device__ __forceinline__ int64_t row(int64_t j) const { return first_row + j; }
  __device__ __forceinline__ int64_t label(int64_t j) const { return bank_labels[first_row + j]; }
  __device__ __forceinline__ int64_t id(int64_t j) const { return row_id(bank_ids, first_row + j); }
  __device__ __forceinline__ T similarity(int a, int64_t j) const {
    return (anchors[a].state & kFinite) ? s[a * columns + j] : static_cast<T>(NAN);
  }
};

}  // namespace
}  // namespace xbn::cuda
