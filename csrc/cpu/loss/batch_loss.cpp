// batch_loss: the loss of B anchors against the other rows of their own batch, from the products of all with all.
// batch_sums: what some of them, A from row `first` on, add to it.
//
//   in     dots [B, B] = z z^T, of each anchor with every row, labels [B], ids [B] or null;  of batch_sums dots [A, B]
//   out    loss [1], grad_dots [B, B];  totals [7], grad_dots [A, B]
//   math   s_ij = dots_ij / max(|z_j|, eps) if renormalize, and |z_j|^2 is dots_jj, which belongs to no pair. The rest
//          is as in memory_loss.cpp, except that the rows carry a gradient, too. It is in dots_jj:
//          dL/ddots_ij = g_ij / |z_j|,  dL/ddots_jj = -sum_i g_ij dots_ij / (2 |z_j|^3),  g = dL/ds
//          batch_sums has s_ij = dots_ij, and g up to the averages, which are those of all anchors
//   NaN    an anchor with a NaN or an Inf has no finite product with itself: all its similarities are NaN, and so is
//          their gradient
//   looks  16 anchors meet all rows, a tile at a time, in the scorer of memory_loss. That has anchors side by side,
//          dots has them one above the other: so a tile is transposed, and its gradient back (dots need not be
//          symmetric, since a learned temperature may be in one side of it). The weights of pairs are kept until the
//          anchors' sums are known.
//   split  16 anchors a unit. Once all have their sums, again, to divide by what there is of all: every unit then has
//          its part of dL/ddots_jj, added in the order of units. So the bits are the same on any number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels.h"
#include "../cpu.h"
#include "triplets.h"

namespace xbn {
namespace {

constexpr int64_t kBatchAnchors = 16;  // anchors of a unit: whole vectors of the widest instruction set

// The rows of the batch, and those of them that are anchors.
template <typename T>
struct Batch {
  Batch(const BatchLossParams<T>& p_, const LossSpec& loss)
      : p(p_),
        norm(p.B, T(1)),
        inverse_norm(p.B, T(1)),
        number(p.B),
        labels(p.labels, own_ids().data(), p.B, p.B),
        anchor_label(round_up(p.A, kBatchAnchors), kPaddedAnchor),
        anchor_excluded(round_up(p.A, kBatchAnchors), kNoneExcluded),
        thresholds(goes_in_rounds(loss) ? most_positives(labels, p.labels, p.B) : 0) {
    std::copy_n(labels.label.data() + p.first, p.A, anchor_label.data());
    std::copy_n(labels.excluded.data() + p.first, p.A, anchor_excluded.data());
    std::iota(number.begin(), number.end(), 0);
    for (int64_t j = 0; p.renormalize && j < p.B; ++j) {
      norm[j] = std::sqrt(p.dots[j * p.B + j]);
      inverse_norm[j] = 1 / std::max(norm[j], static_cast<T>(p.eps));
    }
  }

  // The sample of each row or, where it has none, an id that no other row has: a row is no pair with its own.
  std::vector<int64_t> own_ids() const {
    std::vector<int64_t> own(p.B);
    for (int64_t i = 0; i < p.B; ++i) own[i] = stored_id(p.ids, i, i);
    return own;
  }

  // For each row, whether it is anything but a negative of all anchors from `first` on.
  std::vector<char> mixed(int64_t first, int64_t count) const {
    std::vector<char> of_label(labels.distinct_labels.size()), of_id(labels.ids.size()), mixed(p.B);
    for (int64_t i = first; i < first + count; ++i) of_label[anchor_label[i]] = of_id[anchor_excluded[i]] = 1;
    for (int64_t j = 0; j < p.B; ++j) mixed[j] = of_label[labels.label[j]] | of_id[labels.excluded[j]];
    return mixed;
  }

  bool is_finite(int64_t i) const { return T(0) * p.dots[i * p.B + p.first + i] == T(0); }
  bool ranks(int64_t i) const { return is_marked(p.anchors, i); }

  const BatchLossParams<T>& p;
  std::vector<T> norm, inverse_norm;                   // [B]
  std::vector<int64_t> number;                         // [B] 0, 1, ...
  const AnchorLabels labels;                           // of the rows
  std::vector<int32_t> anchor_label, anchor_excluded;  // of the anchors, as `labels` has them, in whole units
  const int64_t thresholds;                            // of all triplets: at most so many for an anchor
};

}  // namespace

#define XBN_ISA_SOURCE "loss/batch_loss_kernel.h"
#include "../for_each_isa.h"

namespace {

// What all anchors are given in common for the second pass: the first is then done twice.
template <typename T>
double given_in_common(const Batch<T>& batch, const LossSpec& loss, const Cpu& cpu) {
  const BatchLossParams<T>& p = batch.p;
  if (!gives_in_common(loss)) return 0;
  std::vector<SlotSums> sums(p.A);
  cpu.parallel(ceil_div(p.A, kBatchAnchors), p.A * p.B, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, look_at_anchors(p, loss, batch, unit * kBatchAnchors, sums.data()));
  });
  const auto sums_of = [&](int64_t i) { return batch.ranks(i) ? sums[i] : SlotSums(); };
  return mean_in_common(sum_in_common(loss, p.A, sums_of));
}

// What the anchors add up to; grad_dots is that by the similarities, up to the averages.
template <typename T>
LossSum rank_batch(const Batch<T>& batch, const LossSpec& loss, const Cpu& cpu) {
  const BatchLossParams<T>& p = batch.p;
  const double common = given_in_common(batch, loss, cpu);
  std::vector<RowResult> results(p.A);
  cpu.parallel(ceil_div(p.A, kBatchAnchors), p.A * p.B, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, rank_anchors(p, loss, batch, common, unit * kBatchAnchors, results.data()));
  });
  LossSum sum;
  for (int64_t i = 0; i < p.A; ++i)
    if (batch.ranks(i)) sum.add(results[i]);
  return sum;
}

}  // namespace

template <typename T>
void batch_sums(const BatchSumsParams<T>& sums, const LossSpec& loss, const Cpu& cpu) {
  const BatchLossParams<T> p{sums, false, 1, nullptr};
  rank_batch(Batch<T>(p, loss), loss, cpu).store(p.totals);
}

template <typename T>
void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Cpu& cpu) {
  const Batch<T> batch(p, loss);
  const int64_t units = ceil_div(p.B, kBatchAnchors), work = p.B * p.B;
  const LossSum sum = rank_batch(batch, loss, cpu);
  *p.loss = static_cast<T>(sum.loss());
  if (p.grad_dots == nullptr) return;
  const T of_negatives = static_cast<T>(sum.average(group_of(loss, 0)));
  const T of_positives = static_cast<T>(sum.average(group_of(loss, 1)));
  const Scratch<T> sums(units * p.B);  // of dL/ddots_jj, by unit
  cpu.parallel(units, work, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa,
                 settle_anchors(p, batch, of_negatives, of_positives, unit * kBatchAnchors, sums.data() + unit * p.B));
  });
  if (!p.renormalize) return;
  cpu.parallel(units, work,
               [&](int64_t unit) { XBN_CALL_ISA(cpu.isa, settle_norms(p, batch, sums.data(), unit * kBatchAnchors)); });
}

template void batch_loss(const BatchLossParams<float>&, const LossSpec&, const Cpu&);
template void batch_loss(const BatchLossParams<double>&, const LossSpec&, const Cpu&);
template void batch_sums(const BatchSumsParams<float>&, const LossSpec&, const Cpu&);
template void batch_sums(const BatchSumsParams<double>&, const LossSpec&, const Cpu&);

}  // namespace xbn
