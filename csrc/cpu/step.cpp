// step_pairs, step_total: what a step computes besides its ops, before and after its losses.
//
//   in     mask, ids, slots [B], step, count;  losses, weights, derivatives [B, D], z [B, D], norm [B]
//   out    anchors, exclude [B], ranked;  loss, grad [B, D], grad_rows [B, D];  step is counted
//   math   grad_z = own_weight (own_anchors + own_rows) + memory_weight grad_memory, then that of normalize; of
//          grad_memory the mean of what is across the anchors is taken off first, where that is asked for
//   split  runs of rows: the same bits on any number of threads
#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "../math/formulas.h"
#include "cpu.h"

namespace xbn {
namespace {
constexpr int64_t kElements = 1 << 14;  // of a unit: a few microseconds
}

#define XBN_ISA_SOURCE "step_kernel.h"
#include "for_each_isa.h"

void step_pairs(const StepPairsParams& p, const Cpu&) {
  for (int64_t i = 0; i < p.B && p.anchors != nullptr; ++i) p.anchors[i] = !p.mask[i];
  for (int64_t i = 0; i < p.B && p.exclude != nullptr; ++i)
    p.exclude[i] = stored_id(p.ids, i, p.slots == nullptr ? -1 : p.slots[i]);
  if (p.ranked != nullptr) *p.ranked = *p.step < p.warmup_steps ? 0 : *p.count;
}

template <typename T>
void step_total(const StepTotalParams<T>& p, const Cpu& cpu) {
  double loss = 0;
  if (p.own_loss != nullptr) loss += p.own_weight * static_cast<double>(*p.own_loss);
  if (p.memory_loss != nullptr) loss += p.memory_weight * static_cast<double>(*p.memory_loss);
  *p.loss = static_cast<T>(loss);
  ++*p.step;
  if (p.no_pairs != nullptr) std::fill_n(p.no_pairs, 2, std::numeric_limits<double>::quiet_NaN());
  if (p.grad == nullptr) return;
  if (p.grad_memory != nullptr && p.mean_gradient != nullptr) XBN_CALL_ISA(cpu.isa, mean_gradient(p));
  const int64_t rows = ceil_div(kElements, p.D);
  cpu.parallel(ceil_div(p.B, rows), p.B * p.D, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, total_gradients(p, unit * rows, std::min((unit + 1) * rows, p.B)));
  });
}

template void step_total(const StepTotalParams<float>&, const Cpu&);
template void step_total(const StepTotalParams<double>&, const Cpu&);

}  // namespace xbn
