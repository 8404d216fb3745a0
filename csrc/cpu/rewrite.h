// A pending map that a sweep of the loss writes into the bank on its way: the numbers of transform_, without its pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace xbn {

template <typename S>
class Rewrite {
 public:
  Rewrite(const TransformParams<S>& p, int64_t splits)
      : bank(p.bank), D(p.D), scale(p.scale, p.scale + D), shift(p.shift, p.shift + D), sums_(splits * 2 * D, 0.0) {}

  // [2, D] of the rows of a split as written
  double* sums(int64_t split) { return sums_.data() + split * 2 * D; }

  // After the sweep: the bank's sums, added up in the order of the splits; nothing is pending any more.
  void settle(const TransformParams<S>& p) const {
    std::fill(p.sums, p.sums + 2 * D, 0.0);
    for (size_t k = 0; k < sums_.size(); ++k) p.sums[k % (2 * D)] += sums_[k];
    std::fill(p.scale, p.scale + D, 1.0);
    std::fill(p.shift, p.shift + D, 0.0);
  }

  S* const bank;    // [M, D]
  const int64_t D;  //
  const std::vector<S> scale, shift;

 private:
  std::vector<double> sums_;
};

}  // namespace xbn
