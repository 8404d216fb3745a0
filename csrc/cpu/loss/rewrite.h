// A pending map that a sweep of the loss writes into the bank on its way: the numbers of transform_, without its pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../kernels.h"
#include "../cpu.h"

namespace xbn {

template <typename S>
class Rewrite {
 public:
  explicit Rewrite(const TransformParams<S>& p)
      : bank(p.bank), D(p.D), scale(p.scale, p.scale + D), shift(p.shift, p.shift + D), params_(p) {}

  // All rows are written, and these are the bank's sums, [2, D]: nothing is pending any more.
  void finish(const std::vector<double>& sums) const {
    std::copy(sums.begin(), sums.end(), params_.sums);
    std::fill(params_.scale, params_.scale + D, 1.0);
    std::fill(params_.shift, params_.shift + D, 0.0);
  }

  S* const bank;  // [M, D]
  const int64_t D;
  const std::vector<S> scale, shift;

 private:
  const TransformParams<S> params_;
};

}  // namespace xbn
