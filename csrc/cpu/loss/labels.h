// Which anchors and rows are pairs, and of one label, in numbers so small that vectors compare them: the index of a
// label or an id among the anchors' distinct ones, sorted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../math/formulas.h"

namespace xbn {

constexpr int64_t kScoredRows = 256;   // rows that are scored together, at most
constexpr int32_t kNoAnchor = -1;      // label group of a row that no anchor has as a positive
constexpr int32_t kPaddedAnchor = -2;  // label group of the anchors that fill up the last block
constexpr int32_t kNoneExcluded = -2;  // excluded group of an anchor that is paired with any row

// Labels or ids of anchors, each once, in ascending order. Most rows of the memory have another: a hashed bit says so
// sooner than a search would.
class Distinct {
 public:
  Distinct(const int64_t* values, int64_t n) : sorted_(values, values + n), may_have_(kBits) {
    std::sort(sorted_.begin(), sorted_.end());
    sorted_.erase(std::unique(sorted_.begin(), sorted_.end()), sorted_.end());
    for (const int64_t value : sorted_) may_have_[hash(value)] = true;
  }

  size_t size() const { return sorted_.size(); }

  // The index of a value, or kNoAnchor.
  int32_t index_of(int64_t value) const {
    if (!may_have_[hash(value)]) return kNoAnchor;
    const auto it = std::lower_bound(sorted_.begin(), sorted_.end(), value);
    return it != sorted_.end() && *it == value ? static_cast<int32_t>(it - sorted_.begin()) : kNoAnchor;
  }

 private:
  static constexpr int kLogBits = 14;
  static constexpr size_t kBits = size_t{1} << kLogBits;  // 2 KiB, in a first-level cache
  static size_t hash(int64_t value) { return static_cast<uint64_t>(value) * 0x9e3779b97f4a7c15u >> (64 - kLogBits); }

  std::vector<int64_t> sorted_;
  std::vector<bool> may_have_;
};

// The labels of B anchors, and the ids that they are not paired with.
struct AnchorLabels {
  // exclude: [B] or null; padded: B and the anchors that fill up the last block
  AnchorLabels(const int64_t* labels_of_anchors, const int64_t* exclude, int64_t B, int64_t padded)
      : distinct_labels(labels_of_anchors, B),
        ids(exclude, exclude != nullptr ? B : 0),
        label(padded, kPaddedAnchor),
        excluded(padded, kNoneExcluded) {
    for (int64_t i = 0; i < B; ++i) {
      label[i] = distinct_labels.index_of(labels_of_anchors[i]);
      if (exclude != nullptr && is_id(exclude[i])) excluded[i] = ids.index_of(exclude[i]);
    }
  }

  const Distinct distinct_labels;  // of the anchors
  const Distinct ids;              // that some anchor is not paired with
  std::vector<int32_t> label;      // [padded] index of the anchor's label in `distinct_labels`, or kPaddedAnchor
  std::vector<int32_t> excluded;   // [padded] index in `ids` of the id it is not paired with, or kNoneExcluded
};

// Rows that are scored together, at most kScoredRows.
struct ScoredRows {
  int64_t size;
  const int64_t* number;    // ascending
  const int32_t* label;     // index of the row's label among the anchors', or kNoAnchor
  const int32_t* excluded;  // index of the row's id among the excluded ones, or kNoAnchor
  const char* mixed;        // whether the row is anything but a negative of all anchors
};

}  // namespace xbn
