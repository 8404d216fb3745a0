// transform_: rows [0, count) of the bank become scale * row + shift, in place.
//
//   in, out  bank [M, D]; scale, shift [D] in double, which become 1 and 0
//   in       count [1]
//   out      sums [2, D] in double: sum and sum of squares of the rows as rounded to the bank's dtype. They
//            are taken in the same pass, so the bank's moments are always those of what is stored and rounding
//            cannot add up over the steps.
//   split    at most kSplits runs of rows, their sums added in order: the same bits on any number of threads
#include <algorithm>
#include <vector>

#include "transform.h"

namespace xbn {
namespace {
constexpr int64_t kSplits = 32;
constexpr int64_t kMinRows = 64;  // shorter runs are not worth a thread
}  // namespace

#define XBN_ISA_SOURCE "transform_kernel.h"
#include "for_each_isa.h"

template <typename S>
void rewrite_rows(S* bank, int64_t count, int64_t D, const double* a, const double* b, double* sums, const Cpu& cpu) {
  const int64_t run = std::max(kMinRows, ceil_div(count, kSplits));
  const int64_t runs = ceil_div(count, run);
  using C = typename Compute<S>::type;
  const std::vector<C> scale(a, a + D), shift(b, b + D);
  std::vector<double> partial(runs * 2 * D, 0.0);
  cpu.parallel(runs, count * D, [&](int64_t r) {
    const int64_t begin = r * run, end = std::min(begin + run, count);
    double* sum = partial.data() + r * 2 * D;
    XBN_CALL_ISA(cpu.isa, transform_rows(bank + begin * D, end - begin, D, scale.data(), shift.data(), sum, sum + D));
  });
  std::fill(sums, sums + 2 * D, 0.0);
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t d = 0; d < 2 * D; ++d) sums[d] += partial[r * 2 * D + d];
}

template <typename S>
void transform(const TransformParams<S>& p, const Cpu& cpu) {
  rewrite_rows(p.bank, *p.count, p.D, p.scale, p.shift, p.sums, cpu);
  std::fill(p.scale, p.scale + p.D, 1.0);
  std::fill(p.shift, p.shift + p.D, 0.0);
}

#define XBN_INSTANTIATE(S, ...)                                   \
  template void transform(const TransformParams<S>&, const Cpu&); \
  template void rewrite_rows(S*, int64_t, int64_t, const double*, const double*, double*, const Cpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn
