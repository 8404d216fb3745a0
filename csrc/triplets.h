// All triplets of an anchor, without going through them: of a negative only its place among the positives matters.
//
//   in     t_0 <= t_1 <= ... the similarities of an anchor's positives, sorted: its thresholds;  s_n of a negative
//   math   x = s_n + margin, k = #{r : t_r < x}: the negative is active in k triplets, which cost k x - (t_0 + ... + t_k-1),
//          and weighs +k in the gradient. A positive with the similarity t_r weighs -#{n : k_n > r}, so equal ones weigh
//          the same.
//   NaN    sorts first and is below every x, a NaN x is above every threshold: it counts, and makes the sum NaN
#pragma once

#include "formulas.h"

namespace xbn {

template <typename T>
XBN_FORMULA bool sorts_before(T a, T b) {
  return a < b || (a != a && b == b);
}

// k: how many of n sorted thresholds are below x.
template <typename T>
XBN_FORMULA int64_t rank_among(const T* thresholds, int64_t n, T x) {
  int64_t begin = 0;
  while (begin < n) {
    const int64_t middle = begin + (n - begin) / 2;
    if (x <= thresholds[middle])
      n = middle;
    else
      begin = middle + 1;
  }
  return begin;
}

// r of a positive whose similarity is one of n > 0 sorted thresholds; within them even if it is not.
template <typename T>
XBN_FORMULA int64_t place_among(const T* thresholds, int64_t n, T similarity) {
  int64_t begin = 0, end = n - 1;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (sorts_before(thresholds[middle], similarity))
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

}  // namespace xbn
