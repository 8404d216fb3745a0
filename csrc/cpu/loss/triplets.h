// The thresholds of all anchors, and how many negatives are above each: what a loss of all triplets needs besides the
// scorer. A sweep keeps them in a fixed amount of memory: if the bank has more positives of an anchor than that holds,
// the program runs in several rounds, each for the next positives of every anchor in the order of the bank.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../../math/ranks.h"
#include "sweep.h"

namespace xbn {

constexpr int64_t kFewThresholds = 32;  // of every anchor of a block: negatives are then compared with each, in vectors

// Rows with the label of an anchor: of the label that has the most.
inline int64_t most_positives(const AnchorLabels& labels, const int64_t* row_labels, int64_t n) {
  std::vector<int64_t> rows(labels.distinct_labels.size() + 1, 0);
  for (int64_t j = 0; j < n; ++j)
    ++rows[labels.distinct_labels.index_of(row_labels[j]) + 1];  // kNoAnchor: in the first
  rows[0] = 0;
  return *std::max_element(rows.begin(), rows.end());
}

// How many thresholds of each anchor a sweep keeps at a time.
template <typename T>
int64_t thresholds_per_anchor(int64_t anchors, int64_t wanted) {
  constexpr int64_t kBytes = 16 << 20;
  constexpr int64_t kLeast = 256;
  const int64_t fitting = kBytes / static_cast<int64_t>(sizeof(T) + sizeof(uint32_t)) / std::max<int64_t>(anchors, 1);
  return std::min(wanted, std::max(fitting, kLeast));
}

// Of anchors in blocks of kBlock.
template <typename T, int64_t kBlock>
class Triplets {
 public:
  // most: positives that an anchor may have; kept: thresholds of each anchor
  Triplets(int64_t anchors, int64_t most, int64_t kept)
      : rounds(most == 0 ? 0 : ceil_div(most, kept)),
        collected(anchors),
        lowest(anchors),
        capacity_(kept),
        thresholds_(anchors * kept),
        above_(anchors * (kept + 1)),
        side_by_side_(ceil_div(anchors, kBlock) * kFewThresholds * kBlock) {}

  // Chooses the rows that the sweeps of positives look at: of every label the next that are kept.
  void begin_round(int64_t round, Sweep<T>& sweep, const int64_t* bank_labels) {
    std::fill(collected.begin(), collected.end(), 0);
    if (rounds == 1) return;
    if (round == 0) std::fill(sweep.to.begin(), sweep.to.end(), 0);
    sweep.from = sweep.to;
    std::vector<int64_t> taken(sweep.from.size(), 0);
    for (int64_t j = 0; j < sweep.count; ++j) {
      const int32_t label = sweep.labels.distinct_labels.index_of(bank_labels[j]);
      if (label == kNoAnchor || j < sweep.from[label] || taken[label] == capacity_) continue;
      taken[label] += 1;
      sweep.to[label] = j + 1;
    }
  }

  // Once they are collected: the thresholds of anchor i sorted, ready to be compared with.
  void sort(int64_t i) {
    constexpr T kNone = std::numeric_limits<T>::infinity();
    const int64_t n = collected[i], block = i / kBlock;
    T* const t = thresholds(i);
    std::sort(t, t + n, [](T a, T b) { return sorts_before(a, b); });
    std::fill_n(above(i), n + 1, 0);
    const auto finite_or_least = [](T x) { return x == x ? x : -kNone; };
    lowest[i] = n == 0 ? kNone : finite_or_least(t[0]);
    for (int64_t r = 0; r < few(block); ++r)
      side_by_side(block)[r * kBlock + i % kBlock] = r < n ? finite_or_least(t[r]) : kNone;
  }

  // Once the negatives are counted: completes the sums of anchor i over negatives and over positives. Of either,
  // `weight` is how many are in a triplet that costs something; the round of the lowest threshold has all such
  // negatives.
  void settle(int64_t i, RowSums& negatives, RowSums& positives) {
    if (few(i / kBlock) < 0) settle_ranks(i, negatives);
    const uint32_t* const of_threshold = above(i);
    for (int64_t r = 0; r < collected[i] && of_threshold[r] > 0; ++r) positives.weight += 1;
    if (collected[i] > 0) negatives.weight = std::max(negatives.weight, static_cast<double>(of_threshold[0]));
  }

  // Where negatives were counted by rank, those above a threshold are those of a higher rank, and what they cost still
  // lacks the thresholds themselves.
  void settle_ranks(int64_t i, RowSums& sums) {
    uint32_t higher = 0, of_next = above(i)[collected[i]];
    double cost = 0;
    for (int64_t r = collected[i] - 1; r >= 0; --r) {
      higher += of_next;
      of_next = above(i)[r];
      above(i)[r] = higher;
      if (higher > 0) cost += static_cast<double>(higher) * static_cast<double>(thresholds(i)[r]);
    }
    sums.value -= cost;
  }

  // The largest number of thresholds of an anchor of a block, or -1 if those are not few.
  int64_t few(int64_t block) const {
    const auto first = collected.begin() + block * kBlock;
    const int64_t largest = *std::max_element(first, first + kBlock);
    return largest <= kFewThresholds ? largest : -1;
  }

  // Of anchor i, in any thread.
  void collect(int64_t i, T similarity) {
    thresholds(i)[__atomic_fetch_add(&collected[i], 1, __ATOMIC_RELAXED)] = similarity;
  }
  void count(int64_t i, int64_t rank, uint32_t negatives) {
    __atomic_fetch_add(above(i) + rank, negatives, __ATOMIC_RELAXED);
  }

  // [collected] of anchor i
  T* thresholds(int64_t i) const { return thresholds_.data() + i * capacity_; }
  // [collected + 1] negatives above each; before `settle`, where there are more than few, negatives of each rank
  uint32_t* above(int64_t i) const { return above_.data() + i * (capacity_ + 1); }
  // [few][kBlock] the thresholds of a block, infinity where an anchor has fewer
  T* side_by_side(int64_t block) const { return side_by_side_.data() + block * kFewThresholds * kBlock; }

  const int64_t rounds;            // 0: there is no triplet
  std::vector<int64_t> collected;  // [rows] thresholds of this round
  std::vector<T> lowest;           // [rows] the least of them, infinity without any

 private:
  const int64_t capacity_;
  Scratch<T> thresholds_;
  Scratch<uint32_t> above_;
  Scratch<T> side_by_side_;
};

}  // namespace xbn
