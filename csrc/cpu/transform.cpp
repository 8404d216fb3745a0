// transform_: rows [0, count) of the bank become scale * row + shift, in place.
//
//   in, out  bank [M, D]
//   in       scale, shift [D] in double
//   out      sums [2, D] in double: sum and sum of squares of the rows as rounded to the bank's dtype. They
//            are taken in the same pass, so the bank's moments are always those of what is stored and rounding
//            cannot add up over the steps.
//   split    at most kSplits runs of rows, their sums added in order: the same bits on any number of threads
#include "transform.h"

#include <algorithm>
#include <vector>

namespace xbn {
namespace {
constexpr int64_t kSplits = 32;
constexpr int64_t kMinRows = 64;  // shorter runs are not worth a thread
}  // namespace

#define XBN_ISA_SOURCE "transform_kernel.h"
#include "for_each_isa.h"

template <typename S>
void transform(const TransformParams<S>& p, double* sums, const Cpu& cpu) {
  const int64_t run = std::max(kMinRows, ceil_div(p.count, kSplits));
  const int64_t runs = ceil_div(p.count, run);
  std::vector<S> scale(p.D), shift(p.D);
  for (int64_t d = 0; d < p.D; ++d) {
    scale[d] = static_cast<S>(p.scale[d]);
    shift[d] = static_cast<S>(p.shift[d]);
  }
  std::vector<double> partial(runs * 2 * p.D, 0.0);
  cpu.parallel(runs, [&](int64_t r) {
    const int64_t begin = r * run, end = std::min(begin + run, p.count);
    double* sum = partial.data() + r * 2 * p.D;
    XBN_CALL_ISA(cpu.isa,
                 transform_rows(p.bank + begin * p.D, end - begin, p.D, scale.data(), shift.data(), sum, sum + p.D));
  });
  std::fill(sums, sums + 2 * p.D, 0.0);
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t d = 0; d < 2 * p.D; ++d) sums[d] += partial[r * 2 * p.D + d];
}

template void transform(const TransformParams<float>&, double*, const Cpu&);
template void transform(const TransformParams<double>&, double*, const Cpu&);

}  // namespace xbn
