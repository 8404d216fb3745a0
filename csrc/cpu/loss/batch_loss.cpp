// batch_loss: the loss of B anchors against the other rows of their own batch, from the products of all with all.
//
//   in     dots [B, B] = z z^T, labels [B], ids [B] or null
//   out    loss [1], grad_dots [B, B]
//   math   s_ij = dots_ij / max(|z_j|, eps) if renormalize, and |z_j|^2 is dots_jj, which belongs to no pair. The rest is as
//          in memory_loss.cpp, except that the rows carry a gradient, too. It is in dots_jj:
//          dL/ddots_ij = g_ij / |z_j|,  dL/ddots_jj = -sum_i g_ij dots_ij / (2 |z_j|^3),  g = dL/ds
//   NaN    an anchor with a NaN or an Inf has no finite product with itself: all its similarities are NaN, and so is their
//          gradient
//   split  rows, an anchor's pairs each, then stripes of columns, each summed in row order: the same bits on any number of
//          threads
#include "../../kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../../math/ranks.h"

namespace xbn {
namespace {

constexpr int64_t kRows = 8;      // anchors of a unit
constexpr int64_t kStripe = 64;   // columns of a unit
constexpr int64_t kPadding = 16;  // pairs of an anchor are padded to whole vectors of the widest instruction set

// The pairs of one anchor with all rows, padded with pairs that do not exist.
template <typename T>
struct BatchRow {
  explicit BatchRow(int64_t B)
      : n(round_up(B, kPadding)),
        s(n),
        positive(n),
        pair(n),
        weight{std::vector<T>(n), std::vector<T>(n)},
        grad(n),
        thresholds(n),
        below(n + 1),
        above(n + 1) {}

  const int64_t n;
  bool finite = true;                    // whether the anchor is
  std::vector<T> s;                      // similarities
  std::vector<Count<T>> positive, pair;  // whether they are of one label, and whether they are a pair: -1 or 0
  Pairs pairs[kSlots] = {};              // that each slot takes
  std::vector<T> weight[kSlots];         // of those
  std::vector<T> grad;                   // their sum, each slot's times its factor
  std::vector<T> thresholds;             // of all triplets: the similarities of the positives, sorted,
  std::vector<double> below;             // the sum of all that are lower,
  std::vector<int64_t> above;            // and how many negatives are above
};

}  // namespace

#define XBN_ISA_SOURCE "loss/batch_loss_kernel.h"
#include "../for_each_isa.h"

template <typename T>
void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Cpu& cpu) {
  std::vector<T> norm(p.B), inverse_norm(p.B, T(1));
  for (int64_t j = 0; p.renormalize && j < p.B; ++j) {
    norm[j] = std::sqrt(p.dots[j * p.B + j]);
    inverse_norm[j] = 1 / std::max(norm[j], static_cast<T>(p.eps));
  }
  std::vector<RowResult> results(p.B);
  cpu.parallel(ceil_div(p.B, kRows), [&](int64_t unit) {
    const int64_t begin = unit * kRows, end = std::min(begin + kRows, p.B);
    BatchRow<T> row(p.B);
    XBN_CALL_ISA(cpu.isa, rank_rows(p, loss, inverse_norm.data(), begin, end, row, results.data()));
  });
  LossSum sum;
  for (int64_t i = 0; i < p.B; ++i)
    if (p.anchors == nullptr || p.anchors[i]) sum.add(results[i]);
  *p.loss = static_cast<T>(sum.loss());
  if (p.grad_dots == nullptr) return;
  const T of_negatives = static_cast<T>(sum.average(group_of(loss, 0)));
  const T of_positives = static_cast<T>(sum.average(group_of(loss, 1)));
  cpu.parallel(ceil_div(p.B, kStripe), [&](int64_t stripe) {
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, p.B);
    XBN_CALL_ISA(cpu.isa, settle_columns(p, norm.data(), inverse_norm.data(), of_negatives, of_positives, begin, end));
  });
}

template void batch_loss(const BatchLossParams<float>&, const LossSpec&, const Cpu&);
template void batch_loss(const BatchLossParams<double>&, const LossSpec&, const Cpu&);

}  // namespace xbn
