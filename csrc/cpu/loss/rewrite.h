// A pending map that a sweep of the loss writes into the bank on its way: the numbers of transform_, without its pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../params.h"

namespace xbn {

template <typename S>
class Rewrite {
 public:
  explicit Rewrite(const TransformParams<S>& p)
      : bank(p.bank), D(p.D), scale(p.scale, p.scale + D), shift(p.shift, p.shift + D), p_(p) {}

  // All rows are written, and these are the bank's sums, [2, D]: nothing is pending any more.
  void finish(const std::vector<double>& sums) const {
    std::copy(sums.begin(), sums.end(), p_.sums);
    std::fill(p_.scale, p_.scale + D, 1.0);
    std::fill(p_.shift, p_.shift + D, 0.0);
  }

  S* const bank;  // [M, D]
  const int64_t D;
  const std::vector<S> scale, shift;

 private:
  const TransformParams<S>& p_;
};

}  // namespace xbn
