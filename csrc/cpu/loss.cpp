// memory_loss: the loss of B anchors against the bank and its derivative by the anchors, in one sweep.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], of which rows [0, count) count
//   out    loss [1], grad_z [B, D]
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          loss = sum_ij value(s_ij),  grad_z_i = sum_j weight(s_ij) r_j, positives and negatives apart, because
//          some reductions scale them apart. The bank carries no gradient, so that is the whole derivative.
//          An anchor with a NaN or an Inf has NaN similarities and a NaN gradient.
//   sweep  the bank goes by in tiles that stay in cache. A tile is converted, mapped and normalised once, then
//          each block of 64 anchors multiplies it (similarities), scores the pairs, and multiplies it again with
//          the weights (gradient), skipping the rows in which no pair is active. The workspace is a few
//          times B x D; nothing of size B x M or M x D exists.
//   split  by shape alone (SweepPlan); every split has its own sums, added in order: the same bits on any
//          number of threads
#include "loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "sweep.h"

namespace xbn {

#define XBN_ISA_SOURCE "loss_kernel.h"
#include "for_each_isa.h"

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const Contrastive<T>& loss, const Cpu& cpu) {
  Sweep<T> sweep(p);
  const SweepPlan& plan = sweep.plan;
  cpu.parallel(plan.blocks, [&](int64_t block) { XBN_CALL_ISA(cpu.isa, pack_anchors(p, sweep, block)); });
  cpu.parallel(plan.groups * plan.splits, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, sweep_unit(p, sweep, loss, unit / plan.splits, unit % plan.splits));
  });

  // Every reduction is a factor per kind: loss = sum over kinds of factor * sum of values.
  double value[kKinds] = {0, 0}, active[kKinds] = {0, 0}, rows = 0;
  for (int64_t i = 0; i < p.B; ++i) {
    if (p.anchors != nullptr && !p.anchors[i]) continue;
    rows += 1;
    for (int kind = 0; kind < kKinds; ++kind)
      for (int64_t split = 0; split < plan.splits; ++split) {
        const RowSums& sums = sweep.sums(split, kind, 0)[i];
        value[kind] += sums.value;
        active[kind] += sums.active;
      }
  }
  double factor[kKinds], total = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    factor[kind] = reduction_factor(p.mean, rows, active[kind]);
    total += factor[kind] * value[kind];
  }
  *p.loss = static_cast<T>(total);
  if (p.grad_z == nullptr) return;
  const T weight[kKinds] = {static_cast<T>(factor[kNegative]), static_cast<T>(factor[kPositive])};
  cpu.parallel(p.B, [&](int64_t i) { XBN_CALL_ISA(cpu.isa, reduce_gradient(p, sweep, weight, i)); });
}

#define XBN_INSTANTIATE(T, S) \
  template void memory_loss(const MemoryLossParams<T, S>&, const Contrastive<T>&, const Cpu&);
XBN_INSTANTIATE(float, float)
XBN_INSTANTIATE(float, double)
XBN_INSTANTIATE(double, float)
XBN_INSTANTIATE(double, double)
#undef XBN_INSTANTIATE

}  // namespace xbn
