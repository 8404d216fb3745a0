// settle_sums: what the parts of a bank have added up to becomes what each anchor is given for the next pass or, after the
// last, its part of the loss and what the gradient of each part is multiplied by.
//
//   in     parts [n, slots, B] sums, anchors [B] or null
//   out    given [B], scale [n, slots, B], totals [7]
//   math   sums.h: add, scale_of_part; losses.h: given_for, mean_in_common, finish
//   split  none; parts and anchors are added in their order
#include <algorithm>

#include "../../kernels.h"
#include "../cpu.h"

namespace xbn {

void settle_sums(const SettleSumsParams& p, const LossSpec& loss, const Cpu&) {
  const Program program = make_program(loss);
  const Filled filled = Filled::after(program, p.passes);
  const bool done = p.passes == program.passes;
  std::fill_n(p.given, p.B, 0.0);
  std::fill_n(p.scale, p.n * kSlots * p.B, 0.0);
  LossSum all;
  all.store(p.totals);
  const auto sums_of = [&](int64_t i) {
    SlotSums sums;
    for (int slot = 0; slot < kSlots; ++slot)
      if (filled.some[slot] && is_marked(p.anchors, i))
        sums.of[slot] = sum_of_parts(filled.formula[slot], p.parts + slot * p.B + i, p.n, kSlots * p.B);
    return sums;
  };
  if (!done) {
    const RowSums common = sum_in_common(loss, p.B, sums_of);
    if (gives_in_common(loss)) store_in_common(common, p.totals);
    for (int64_t i = 0; i < p.B; ++i)
      if (is_marked(p.anchors, i)) p.given[i] = given_for(loss, p.passes, sums_of(i).of, mean_in_common(common));
    return;
  }
  for (int64_t i = 0; i < p.B; ++i) {
    if (!is_marked(p.anchors, i)) continue;
    const SlotSums sums = sums_of(i);
    const RowResult result = finish(loss, sums.of);
    all.add(result);
    for (int64_t k = 0; k < p.n; ++k)
      for (int slot = 0; slot < kSlots; ++slot) {
        if (!filled.some[slot]) continue;
        const int64_t at = (k * kSlots + slot) * p.B + i;
        p.scale[at] = scale_of_part(filled.formula[slot], result.factor[slot], p.parts[at], sums.of[slot]);
      }
  }
  all.store(p.totals);
}

}  // namespace xbn
