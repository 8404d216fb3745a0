// What the kernels of the way of halves hand to each other: halves.cu says how they follow each other. They are in
// similarities.cu, scores.cu and weighted_rows.cu.
#pragma once

#include "scores.cuh"

namespace xbn::cuda {

// Bank rows are multiplied by this before they become halves, and must be of a norm in this range: then what a value
// loses is below 2^-22 of the norm. Beyond, fp16 would overflow; below, it has too few digits.
constexpr float kRowTimes = 256;
constexpr float kShortestRow = 0x1p-10f, kLongestRow = 255;

// How a chunk of the bank is divided for scores and gradient.
struct Parts {
  int64_t rows, count;  // of a part, a multiple of 32; how many parts
};

constexpr int64_t kMostRowsOfPart = 8192;

// As many blocks of weighted_rows.cu in all as run at once.
Parts plan_parts(int64_t B, int64_t D, int64_t chunk, int multiprocessors);

// Whether this GPU has the shared memory for rows of D.
bool has_similarities(int64_t D, const Gpu& gpu);

// s [B, chunk] and inverse [chunk] of a chunk of the bank, `chunk` a multiple of 64. Where a row is not of a norm as
// above, *closed is set.
template <typename S>
int launch_similarities(const MemoryLossParams<float, S>& p, const ChunkScores<float>& chunk, float* inverse,
                        unsigned* closed, const Gpu& gpu);

// partial.grad of every split, of the slots that the pass weighs: chunk after chunk it adds up weight * row.
template <typename S>
int launch_weighted_rows(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
                         const ChunkScores<float>& chunk, const Gpu& gpu);

}  // namespace xbn::cuda
