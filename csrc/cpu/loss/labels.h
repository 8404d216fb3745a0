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

inline std::vector<int64_t> distinct(const int64_t* values, int64_t n) {
  std::vector<int64_t> sorted(values, values + n);
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

// The index of a label among the distinct labels of the anchors, or of an id among the excluded ones; or kNoAnchor.
inline int32_t index_in(const std::vector<int64_t>& sorted, int64_t value) {
  if (sorted.empty() || value < sorted.front() || value > sorted.back()) return kNoAnchor;
  const auto it = std::lower_bound(sorted.begin(), sorted.end(), value);
  return *it == value ? static_cast<int32_t>(it - sorted.begin()) : kNoAnchor;
}

// The labels of B anchors, and the ids that they are not paired with.
struct AnchorLabels {
  // exclude: [B] or null; padded: B and the anchors that fill up the last block
  AnchorLabels(const int64_t* labels_of_anchors, const int64_t* exclude, int64_t B, int64_t padded)
      : distinct_labels(distinct(labels_of_anchors, B)),
        ids(exclude != nullptr ? distinct(exclude, B) : std::vector<int64_t>()),
        label(padded, kPaddedAnchor),
        excluded(padded, kNoneExcluded) {
    for (int64_t i = 0; i < B; ++i) {
      label[i] = index_in(distinct_labels, labels_of_anchors[i]);
      if (exclude != nullptr && is_id(exclude[i])) excluded[i] = index_in(ids, exclude[i]);
    }
  }

  const std::vector<int64_t> distinct_labels;  // of the anchors, sorted
  const std::vector<int64_t> ids;              // the distinct ids that some anchor is not paired with, sorted
  std::vector<int32_t> label;     // [padded] index of the anchor's label in `distinct_labels`, or kPaddedAnchor
  std::vector<int32_t> excluded;  // [padded] index in `ids` of the id it is not paired with, or kNoneExcluded
};

// Rows that are scored together, at most kScoredRows.
struct ScoredRows {
  int64_t size;
  const int64_t* number;    // ascending
  const int32_t* label;     // index of the row's label among the anchors', or kNoAnchor
  const int32_t* excluded;  // index of the row's id among the excluded ones, or kNoAnchor
  const char* mixed;        // whether the row is anything but a negative of all anchors
  const char* out;          // whether it is known to have no active pair, if it is not mixed
};

}  // namespace xbn
