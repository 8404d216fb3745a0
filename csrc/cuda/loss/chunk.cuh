// The pairs of a block's anchors with a chunk of the bank, or a part of it, of whose similarities a matrix is stored:
// score_block.cuh says what is asked of them.
#pragma once

#include "score_block.cuh"

namespace xbn::cuda {
namespace {

template <typename T, int kAnchorsOfBlock>
struct ChunkPairs {
  static constexpr int kAnchors = kAnchorsOfBlock;

  Anchor<T> anchors[kAnchors];
  int64_t first_anchor, B;  // anchors from the first on, of how many
  int64_t columns, rows;    // of the part; only the first `rows` exist
  int64_t first_row;        // of the bank
  const int64_t *bank_labels, *bank_ids;
  const T* s;      // [kAnchors, columns] of these anchors,
  int64_t stride;  // rows of so many

  // Similarities are [B, chunk], of bank rows [first, first + chunk); the part is [begin, begin + part) of them.
  __device__ __forceinline__ ChunkPairs(const RankParams<T>& p, const PartialLoss<T>& partial, int64_t first,
                                        int64_t chunk, const T* of_all, int64_t begin, int64_t part)
      : first_anchor(static_cast<int64_t>(blockIdx.x) * kAnchors),
        B(p.B),
        columns(smaller(part, chunk - begin)),
        rows(smaller(columns, stored_rows(p.count, p.M) - first - begin)),
        first_row(first + begin),
        bank_labels(p.bank_labels),
        bank_ids(p.bank_ids),
        s(of_all + first_anchor * chunk + begin),
        stride(chunk) {
#pragma unroll
    for (int a = 0; a < kAnchors; ++a) {
      const int64_t i = smaller(first_anchor + a, B - 1);
      anchors[a] = {p.labels[i], excluded_id(p, i), partial.given[i], partial.state[i]};
    }
  }

  // The part is all of it.
  __device__ __forceinline__ ChunkPairs(const RankParams<T>& p, const PartialLoss<T>& partial, int64_t first,
                                        int64_t chunk, const T* of_all)
      : ChunkPairs(p, partial, first, chunk, of_all, 0, chunk) {}

  __device__ __forceinline__ bool has(int a) const { return first_anchor + a < B; }
  __device__ __forceinline__ bool exists(int64_t j) const { return j < rows; }
  __device__ __forceinline__ int64_t row(int64_t j) const { return first_row + j; }
  __device__ __forceinline__ int64_t label(int64_t j) const { return bank_labels[first_row + j]; }
  __device__ __forceinline__ int64_t id(int64_t j) const { return row_id(bank_ids, first_row + j); }
  __device__ __forceinline__ T similarity(int a, int64_t j) const {
    return (anchors[a].state & kFinite) ? s[a * stride + j] : static_cast<T>(NAN);
  }
};

}  // namespace
}  // namespace xbn::cuda
