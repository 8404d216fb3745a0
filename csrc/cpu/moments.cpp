// moments: mean and biased standard deviation of the rows of x [B, D] that are in the mask and finite.
//
//   in     x [B, D], mask [B] or null
//   out    mean [D], std [D] in double, rows [1] (how many rows counted; 0 gives zeros)
//   math   one pass over x of sums shifted by the first row, so that a mean far from zero costs no digits
//   split  stripes of columns, each summed in row order: the same bits on any number of threads
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "../math/formulas.h"
#include "cpu.h"

namespace xbn {
namespace {
constexpr int64_t kStripe = 64;  // columns a unit sums, 512 bytes of each accumulator
}

#define XBN_ISA_SOURCE "moments_kernel.h"
#include "for_each_isa.h"

template <typename T>
void moments(const MomentsParams<T>& p, const Cpu& cpu) {
  std::vector<int64_t> rows;
  rows.reserve(p.B);
  for (int64_t i = 0; i < p.B; ++i) {
    if (!is_marked(p.mask, i)) continue;
    bool finite = false;
    XBN_CALL_ISA(cpu.isa, row_is_finite(p.x + i * p.D, p.D, &finite));
    if (finite) rows.push_back(i);
  }
  *p.rows = static_cast<int64_t>(rows.size());
  if (rows.empty()) {
    std::fill(p.mean, p.mean + p.D, 0.0);
    std::fill(p.std, p.std + p.D, 0.0);
    return;
  }
  cpu.parallel(ceil_div(p.D, kStripe), p.B * p.D, [&](int64_t stripe) {
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, p.D);
    XBN_CALL_ISA(cpu.isa, moments_stripe(p, rows.data(), static_cast<int64_t>(rows.size()), begin, end));
  });
}

template void moments(const MomentsParams<float>&, const Cpu&);
template void moments(const MomentsParams<double>&, const Cpu&);

}  // namespace xbn
