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

// What the passes of one call share: its operands, the sums of all splits, and what finds the pairs that count.
template <typename T, typename S>
class Passes {
 public:
  // gradients: whether slots add up weight * row; rewritten: the size of Contribution::rewritten.
  Passes(const MemoryLossParams<T, S>& params, const LossSpec& loss, bool gradients, int64_t rewritten, const Cpu& on)
      : p(params), cpu(on), sweep(p), plan(sweep.plan), group_rows_(plan.group_blocks * kAnchorBlock) {
    for (int64_t group = 0; group < plan.groups; ++group)
      groups_.push_back(std::make_unique<Accumulation<T>>(plan, group, gradients, rewritten));
    if constexpr (std::is_same_v<T, float>)
      if (const ByteProducts* products = Screen::products_for(cpu, loss, p.D, p.renormalize))
        screen_.emplace(*products, limit_of_negatives(make_program(loss).pass[0].slot[0]),
                        cpu.screening == Screening::always, plan.blocks);
    cpu.parallel(plan.blocks, p.B * p.D, [&](int64_t block) {
      XBN_CALL_ISA(cpu.isa, pack_anchors(p, sweep, block));
      if constexpr (std::is_same_v<T, float>)
        if (screen_) screen_->encode(p.z, p.B, p.D, sweep, block);
    });
  }

  // Empties the slots that a pass fills, except what weigh goes on with.
  void begin(const Pass& pass) {
    for (int slot = 0; slot < kSlots; ++slot)
      if (pass.slot[slot].pairs != Pairs::none && pass.slot[slot].formula != Formula::weigh)
        for (const auto& group : groups_) group->total.begin(slot, pass.slot[slot].formula);
  }

  // triplets and rewrite may be null.
  void run(const Pass& pass, Triplets<T, kAnchorBlock>* triplets, Rewrite<S>* rewrite) {
    cpu.parallel(plan.groups * plan.splits, sweep.count * p.B * p.D / 32, [&](int64_t unit) {
      const int64_t group = unit / plan.splits, split = unit % plan.splits;
      auto part = groups_[group]->part(pass);
      XBN_CALL_ISA(cpu.isa,
                   sweep_unit(p, sweep, triplets, rewrite, screen_ ? &*screen_ : nullptr, pass, group, split, *part));
      groups_[group]->give(split, std::move(part), [&](Contribution<T>& left, Contribution<T>& right) {
        XBN_CALL_ISA(cpu.isa, add_contribution(left, right, pass));
      });
    });
  }

  // Of anchor i: what its group has, where it is there, and its sums.
  Contribution<T>& all(int64_t i) { return groups_[i / group_rows_]->total; }
  int64_t place(int64_t i) const { return i % group_rows_; }
  RowSums& sums(int slot, int64_t i) { return all(i).sums(slot, 0)[place(i)]; }
  // Of the rows that a map has been written into.
  const std::vector<double>& rewritten() const { return groups_[0]->total.rewritten; }

  const MemoryLossParams<T, S>& p;
  const Cpu& cpu;
  Sweep<T> sweep;
  const SweepPlan& plan;

 private:
  const int64_t group_rows_;
  std::vector<std::unique_ptr<Accumulation<T>>> groups_;
  std::optional<Screen> screen_;
};

// rewrite, if it is not null, is done in the first pass; p has no map then.
template <typename T, typename S>
void rank(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu, Rewrite<S>* rewrite) {
  const bool summed = sums_gradients(loss);
  Passes<T, S> passes(p, loss, p.grad_z != nullptr && summed, rewrite != nullptr ? 2 * p.D : 0, cpu);
  Sweep<T>& sweep = passes.sweep;
  const Program program = make_program(loss, p.grad_z != nullptr);
  std::vector<Total> totals(p.B);
  std::optional<Triplets<T, kAnchorBlock>> triplets;
  if (goes_in_rounds(loss)) {
    const int64_t most = most_positives(sweep.labels, p.bank_labels, sweep.count);
    triplets.emplace(sweep.rows(), most, thresholds_per_anchor<T>(sweep.rows(), most));
  }
  for (int64_t round = 0; round < (triplets ? triplets->rounds : 1); ++round) {
    if (triplets) triplets->begin_round(round, sweep, p.bank_labels);
    for (int k = 0; k < program.passes; ++k) {
      const Pass& pass = program.pass[k];
      if (round == 0) passes.begin(pass);
      passes.run(pass, triplets ? &*triplets : nullptr, k == 0 ? rewrite : nullptr);
      if (triplets && pass.slot[1].formula == Formula::threshold)
        cpu.parallel(sweep.rows(), p.B * sweep.count, [&](int64_t i) { triplets->sort(i); });
      if (triplets && pass.slot[0].formula == Formula::rank)
        cpu.parallel(sweep.rows(), p.B * sweep.count,
                     [&](int64_t i) { triplets->settle(i, passes.sums(0, i), passes.sums(1, i)); });
      for (int64_t i = 0; i < p.B; ++i)
        for (int slot = 0; slot < kSlots; ++slot)
          if (triplets || pass.slot[slot].pairs != Pairs::none) totals[i].sums.of[slot] = passes.sums(slot, i);
      if (k + 1 == program.passes) continue;
      const double common = mean_in_common(
          sum_in_common(loss, p.B, [&](int64_t i) { return is_marked(p.anchors, i) ? totals[i].sums : SlotSums(); }));
      for (int64_t i = 0; i < p.B; ++i)
        sweep.given[i] = static_cast<T>(given_for(loss, k + 1, totals[i].sums.of, common));
    }
  }

  if (rewrite != nullptr) rewrite->finish(passes.rewritten());

  LossSum sum;
  for (int64_t i = 0; i < p.B; ++i) {
    if (!is_marked(p.anchors, i)) continue;
    const RowResult row = finish(loss, totals[i].sums.of);
    sum.add(row);
    for (int slot = 0; slot < kSlots; ++slot) totals[i].factor[slot] = row.factor[slot];
  }
  *p.loss = static_cast<T>(sum.loss());
  sum.store_pairs(p.pairs);
  if (p.grad_z == nullptr) return;
  cpu.parallel(p.B, p.B * p.D, [&](int64_t i) {
    for (int slot = 0; slot < kSlots; ++slot) totals[i].factor[slot] *= sum.average(group_of(loss, slot));
    if (summed)
      XBN_CALL_ISA(cpu.isa, reduce_gradient(p, sweep, passes.all(i), totals[i], i, passes.place(i)));
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
void memory_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Cpu& cpu) {
  const MemoryLossParams<T, S>& ranked = p;
  const bool summed = sums_gradients(loss);
  Passes<T, S> passes(ranked, loss, p.grad_z != nullptr && summed, 0, cpu);
  const Program program = make_program(loss);
  const Pass& pass = program.pass[p.number];
  for (int64_t i = 0; i < p.B && p.given != nullptr; ++i) passes.sweep.given[i] = static_cast<T>(p.given[i]);
  passes.begin(pass);
  passes.run(pass, nullptr, nullptr);
  cpu.parallel(kSlots * p.B, kSlots * p.B * p.D, [&](int64_t unit) {
    const int slot = static_cast<int>(unit / p.B);
    const int64_t i = unit % p.B;
    const bool fills = pass.slot[slot].pairs != Pairs::none && is_marked(p.anchors, i);
    p.sums[unit] = fills ? passes.sums(slot, i) : RowSums{};
    if (p.grad_z != nullptr)
      XBN_CALL_ISA(cpu.isa, slot_gradient(ranked, passes.sweep, passes.all(i), fills ? slot : -1, p.sums[unit],
                                          passes.place(i), p.grad_z + unit * p.D));
    if (fills && pass.slot[slot].formula == Formula::extreme && p.sums[unit].value >= 0) p.sums[unit].value += p.first;
  });
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
  template void memory_sums(const MemorySumsParams<T, S>&, const LossSpec&, const Cpu&);                         \
  template void transform_memory_loss(const TransformParams<S>&, const MemoryLossParams<T, S>&, const LossSpec&, \
                                      const Cpu&);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn
