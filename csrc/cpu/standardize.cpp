// standardize_: if the stored coordinates have wandered off, the bank is rewritten in standardised ones and the pending
// map compensates: what the rows stand for does not change.
//
//   in, out  bank [M, D], sums [2, D], scale [D], shift [D]
//   in       count [1]; ring_sums [2, D] and ring_count [1]: of all the rows that share the map
//   math     u' = a u + b with a = 1 / std(u), b = -mean(u) a;  scale' = scale / a, shift' = shift - scale' b
//            of a dead dimension with a scale far from 1, a = scale
//   why      nothing limits a pending map that is composed over thousands of steps: a memory whose rows enter a little
//            wider than the target shrinks the scale at every step until u = (z - shift) / scale overflows. So does a
//            dimension that dies out: when it lives again, 16 bits would not hold it. Looked at every step (D
//            numbers), needed once in thousands.
#include <vector>

#include "../math/formulas.h"
#include "transform.h"

namespace xbn {

template <typename S>
void standardize(const StandardizeParams<S>& p, const Cpu& cpu) {
  using C = typename Compute<S>::type;
  const int64_t count = *p.ring_count;
  if (count == 0) return;
  std::vector<double> a(p.D), b(p.D);
  bool needed = false;
  for (int64_t d = 0; d < p.D; ++d) {
    const Moments stored = bank_moments(p.ring_sums[d], p.ring_sums[p.D + d], count);
    needed |= off_standard(stored, p.scale[d], p.eps);
    const Affine map = to_standard<C>(stored, p.scale[d], p.eps);
    a[d] = map.scale, b[d] = map.shift;
  }
  if (!needed) return;
  rewrite_rows(p.bank, *p.count, p.D, a.data(), b.data(), p.sums, cpu);
  for (int64_t d = 0; d < p.D; ++d) {
    p.scale[d] /= a[d];
    p.shift[d] -= p.scale[d] * b[d];
  }
}

#define XBN_INSTANTIATE(S, ...) template void standardize(const StandardizeParams<S>&, const Cpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn
