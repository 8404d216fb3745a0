// All triplets on a GPU: what composite.cu calls in the place of its own scores.
#pragma once

#include "anchor.cuh"

namespace xbn::cuda {

// The thresholds of all anchors in one round: ranks.h.
template <typename T>
struct Thresholds {
  int64_t most;         // of an anchor in a round
  T* similarity;        // [B, most] collected ones, in any order, then sorted
  unsigned* above;      // [B, most + 1] negatives of every rank; then, above every threshold
  unsigned* collected;  // [B]
  int64_t *from, *to;   // [B] bank rows among which the anchor's positives are of this round

  static Thresholds carve(Carver& carve, int64_t B, int64_t most) {
    Thresholds t;
    t.most = most;
    t.similarity = carve.take<T>(B * most);
    t.above = carve.take<unsigned>(most > 0 ? B * (most + 1) : 0);
    t.collected = carve.take<unsigned>(most > 0 ? B : 0);
    t.from = carve.take<int64_t>(most > 0 ? B : 0);
    t.to = carve.take<int64_t>(most > 0 ? B : 0);
    return t;
  }
};

// Begins a round: no thresholds, and the rows to collect them from.
template <typename T>
int launch_triplets_begin(const MemoryLossParams<T, T>& p, int64_t round, int64_t rounds, const Thresholds<T>& t,
                          const Gpu& gpu);

// One pass over a chunk, bank rows [first, first + chunk) with the similarities s [2 * B, chunk]: collects thresholds,
// or adds to the sums of the negatives, or weighs the positives.
template <typename T>
int launch_triplets_score(const MemoryLossParams<T, T>& p, const Pass& pass, const PartialLoss<T>& partial,
                          const Thresholds<T>& t, int64_t first, int64_t chunk, T* s, const Gpu& gpu);

// After a pass over the bank: sorts the thresholds, or turns ranks into what is above each and completes the sums.
template <typename T>
int launch_triplets_end(const MemoryLossParams<T, T>& p, const Pass& pass, const PartialLoss<T>& partial,
                        const Thresholds<T>& t, const Gpu& gpu);

}  // namespace xbn::cuda
