// All triplets of an anchor, without visiting each: all that matters of a negative is its place among the positives.
//
//   in     t_0 <= t_1 <= ... the similarities of an anchor's positives, sorted: its thresholds;  s_n of a negative
//   math   x = s_n + margin, k = #{r : t_r < x}: the negative is active in k triplets, which cost k x - (t_0 + ... +
//          t_k-1), and weighs +k in the gradient. A positive with the similarity t_r weighs -#{n : k_n > r}, so equal
//          ones weigh the same.
//   NaN    sorts first and is below every x, a NaN x is above every threshold: it counts, and makes the sum NaN
#pragma once

#include "formulas.h"

namespace xbn {

template <typename T>
XBN_FORMULA bool sorts_before(T a, T b) {
  return (a < b) | ((a != a) & (b == b));
}

template <typename T>
XBN_FORMULA bool is_below(T threshold, T x) {
  return !(x <= threshold);
}

// k: how many of n sorted thresholds are below x.
template <typename T>
XBN_FORMULA int64_t rank_among(const T* thresholds, int64_t n, T x) {
  int64_t rank = 0;
  for (int64_t half = 0; n > 0; n -= half) {
    half = (n + 1) / 2;
    rank += is_below(thresholds[rank + half - 1], x) ? half : 0;
  }
  return rank;
}

// r of a positive whose similarity is one of n > 0 sorted thresholds; within them even if it is not.
template <typename T>
XBN_FORMULA int64_t place_among(const T* thresholds, int64_t n, T similarity) {
  int64_t place = 0;
  for (int64_t half = 0; n > 1; n -= half) {
    half = n / 2;
    place += sorts_before(thresholds[place + half - 1], similarity) ? half : 0;
  }
  return place;
}

}  // namespace xbn
