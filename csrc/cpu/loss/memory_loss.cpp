// memory_loss: the loss of B anchors against the bank and its derivative by the anchors, in one sweep for most losses.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null; rows [0, count) count
//   out    loss [1], grad_z [B, D], pairs [2]
//   passes losses.h says which pairs each takes, and into which slots; one of positives alone only reads their rows
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          sums_i = sum_j of what a slot's formula says of s_ij,  grad_i = sum_j weight(s_ij) r_j, one for each slot,
//          because their factors are known only at the end:  grad_z_i = sum_slot factor_i grad_i. The bank carries no
//          gradient, so that is the whole derivative. An anchor with a NaN or an Inf has NaN similarities and a NaN
//          gradient.
//   sweep  the bank goes by in tiles that stay in cache, the next one fetched meanwhile. A tile is converted and mapped
//          once, or used where it lies if there is nothing to do; then each block of 64 anchors multiplies it
//          (similarities, each times the row's inverse norm), scores the pairs, and multiplies it again with the
//          weights (gradient), skipping the rows without an active pair. The workspace is slots times B x D for each
//          thread and for each level of a tree (contribution.h); nothing of size B x M or M x D exists. A pending map
//          may be written into the bank in the same sweep.
//   screen where a negative counts only above a limit, and the processor has the instructions, products of bytes first
//          find the pairs that may count (screen.h). If they are few, only these are computed, one by one
//          (pairs_kernel.h), to the same bits. So are the pairs of a pass of positives alone
//   split  by shape alone (SweepPlan); every split has its own sums, added along a tree of fixed shape: the same bits
//          on any number of threads
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels.h"
#include "../cpu.h"
#include "../transform.h"
#include "contribution.h"
#include "prefetch.h"
#include "rewrite.h"
#include "screen.h"
#include "sweep.h"
#include "triplets.h"

namespace xbn {

#define XBN_ISA_SOURCE "loss/memory_loss_kernel.h"
#include "../for_each_isa.h"

namespace {

// rewrite, if it is not null, is done in the first pass; p has no map then.
template <typename T, typename S>
void rank(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu, Rewrite<S>* rewrite) {
  Sweep<T> sweep(p);
  const SweepPlan& plan = sweep.plan;
  const Program program = make_program(loss, p.grad_z != nullptr);
  std::vector<Total> totals(p.B);
  std::vector<std::unique_ptr<Accumulation<T>>> groups;
  const int64_t rewritten = rewrite != nullptr ? 2 * p.D : 0;
  for (int64_t group = 0; group < plan.groups; ++group)
    groups.push_back(
        std::make_unique<Accumulation<T>>(plan, group, p.grad_z != nullptr && sums_gradients(loss), rewritten));
  const int64_t group_rows = plan.group_blocks * kAnchorBlock;
  const auto all = [&](int64_t i) -> Contribution<T>& { return groups[i / group_rows]->total; };
  const auto sums_of = [&](int slot, int64_t i) -> RowSums& { return all(i).sums(slot, 0)[i % group_rows]; };
  std::optional<Triplets<T, kAnchorBlock>> triplets;
  if (goes_in_rounds(loss)) {
    const int64_t most = most_positives(sweep.labels, p.bank_labels, sweep.count);
    triplets.emplace(sweep.rows(), most, thresholds_per_anchor<T>(sweep.rows(), most));
  }
  std::optional<Screen> screen;
  if constexpr (std::is_same_v<T, float>)
    if (const ByteProducts* products = Screen::products_for(cpu, loss, p.D, p.renormalize))
      screen.emplace(*products, loss.b, cpu.screening == Screening::always, plan.blocks);
  cpu.parallel(plan.blocks, p.B * p.D, [&](int64_t block) {
    XBN_CALL_ISA(cpu.isa, pack_anchors(p, sweep, block));
    if constexpr (std::is_same_v<T, float>)
      if (screen) screen->encode(p.z, p.B, p.D, sweep, block);
  });
  for (int64_t round = 0; round < (triplets ? triplets->rounds : 1); ++round) {
    if (triplets) triplets->begin_round(round, sweep, p.bank_labels);
    for (int k = 0; k < program.passes; ++k) {
      const Pass& pass = program.pass[k];
      for (int slot = 0; slot < kSlots; ++slot)
        if (round == 0 && pass.slot[slot].pairs != Pairs::none && pass.slot[slot].formula != Formula::weigh)
          for (const auto& group : groups) group->total.begin(slot, pass.slot[slot].formula);
      cpu.parallel(plan.groups * plan.splits, sweep.count * p.B * p.D / 32, [&](int64_t unit) {
        const int64_t group = unit / plan.splits, split = unit % plan.splits;
        auto part = groups[group]->part(pass);
        XBN_CALL_ISA(cpu.isa, sweep_unit(p, sweep, triplets ? &*triplets : nullptr, k == 0 ? rewrite : nullptr,
                                         screen ? &*screen : nullptr, pass, group, split, *part));
        groups[group]->give(split, std::move(part), [&](Contribution<T>& left, Contribution<T>& right) {
          XBN_CALL_ISA(cpu.isa, add_contribution(left, right, pass));
        });
      });
      if (triplets && pass.slot[1].formula == Formula::threshold)
        cpu.parallel(sweep.rows(), p.B * sweep.count, [&](int64_t i) { triplets->sort(i); });
      if (triplets && pass.slot[0].formula == Formula::rank)
        cpu.parallel(sweep.rows(), p.B * sweep.count,
                     [&](int64_t i) { triplets->settle(i, sums_of(0, i), sums_of(1, i)); });
      for (int64_t i = 0; i < p.B; ++i) {
        for (int slot = 0; slot < kSlots; ++slot)
          if (triplets || pass.slot[slot].pairs != Pairs::none) totals[i].sums[slot] = sums_of(slot, i);
        if (k + 1 < program.passes) sweep.given[i] = static_cast<T>(given_for(loss, k + 1, totals[i].sums));
      }
    }
  }

  if (rewrite != nullptr) rewrite->finish(groups[0]->total.rewritten);

  LossSum sum;
  for (int64_t i = 0; i < p.B; ++i) {
    if (p.anchors != nullptr && !p.anchors[i]) continue;
    const RowResult row = finish(loss, totals[i].sums);
    sum.add(row);
    for (int slot = 0; slot < kSlots; ++slot) totals[i].factor[slot] = row.factor[slot];
  }
  *p.loss = static_cast<T>(sum.loss());
  sum.store_pairs(p.pairs);
  if (p.grad_z == nullptr) return;
  const bool summed = sums_gradients(loss);
  cpu.parallel(p.B, p.B * p.D, [&](int64_t i) {
    for (int slot = 0; slot < kSlots; ++slot) totals[i].factor[slot] *= sum.average(group_of(loss, slot));
    if (summed)
      XBN_CALL_ISA(cpu.isa, reduce_gradient(p, sweep, all(i), totals[i], i, i % group_rows));
    else
      XBN_CALL_ISA(cpu.isa, gather_gradient(p, sweep, totals[i], i));
  });
}

// Whether a map can be written in the first pass of the loss: that reads every row that has it, and each in one unit
// only.
template <typename T, typename S>
bool can_rewrite(const MemoryLossParams<T, S>& p, const LossSpec& loss, const SweepPlan& plan, int64_t count) {
  return std::is_same_v<T, S> && plan.groups == 1 && *p.count == count &&
         make_program(loss).pass[0].slot[0].pairs != Pairs::none;
}

}  // namespace

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu) {
  rank(p, loss, cpu, static_cast<Rewrite<S>*>(nullptr));
}

template <typename T, typename S>
void transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                           const Cpu& cpu) {
  const SweepPlan plan = SweepPlan::make(p.B, *t.count, p.D, static_cast<int64_t>(sizeof(T)));
  if (!can_rewrite(p, loss, plan, *t.count)) {
    transform(t, cpu);
    return memory_loss(p, loss, cpu);
  }
  Rewrite<S> rewrite(t);
  MemoryLossParams<T, S> moved = p;
  moved.scale = moved.shift = nullptr;
  rank(moved, loss, cpu, &rewrite);
}

#define XBN_OF(T, S)                                                                                             \
  template void memory_loss(const MemoryLossParams<T, S>&, const LossSpec&, const Cpu&);                         \
  template void transform_memory_loss(const TransformParams<S>&, const MemoryLossParams<T, S>&, const LossSpec&, \
                                      const Cpu&);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn
