// The state of a memory, and what it means for two to be the same.
#pragma once

#include <utility>

#include "compare.h"

namespace xbn {

// All that a memory is made of.
template <typename S>
struct State {
  Exactly<S> bank;
  Exactly<int64_t> labels, ids, steps, head, count;
  Exactly<double> sums, scale, shift, mean, std, variance, innovation, stats;

  static State random(const Sizes& n) {
    const auto zeros = [](int64_t size) { return Exactly<double>(size); };
    const double spread = up_to(1) ? 20 : 1;  // off standard, or not
    State s{normal<S>(n.M * n.D, spread),
            ::labels(n.M, 5),
            ::labels(n.M, 9),
            Exactly<int64_t>(n.M),
            Exactly<int64_t>(1),
            Exactly<int64_t>(1),
            zeros(2 * n.D),
            zeros(n.D),
            zeros(n.D),
            zeros(n.D),
            zeros(n.D),
            zeros(1),
            normal<double>(n.D),
            zeros(3)};
    *s.count = up_to(n.M);
    *s.head = up_to(n.M - 1);
    *s.variance = up_to(1) ? INFINITY : 0.5;
    for (int64_t d = 0; d < n.D; ++d) s.scale[d] = 0.5 + 0.1 * static_cast<double>(d % 7), s.shift[d] = 0.1;
    for (int64_t j = 0; j < *s.count; ++j)
      for (int64_t d = 0; d < n.D; ++d) {
        const double u = as<double>(s.bank[j * n.D + d]);
        s.sums[d] += u;
        s.sums[n.D + d] += u * u;
      }
    return s;
  }

  State<S> copied() const { return with(copy(bank)); }
  State<double> in_double() const { return with(doubles(bank)); }

 private:
  template <typename Other>
  State<Other> with(Exactly<Other> rows) const {
    return {std::move(rows), copy(labels), copy(ids),  copy(steps), copy(head),     copy(count),      copy(sums),
            copy(scale),     copy(shift),  copy(mean), copy(std),   copy(variance), copy(innovation), copy(stats)};
  }
};

// `rows`: how far rows and their sums may be apart, `map`: how far scale and shift.
template <typename A, typename B>
void same(const char* what, const State<A>& ours, const State<B>& truth, double rows, double map, const Sizes& n) {
  close(what, difference(ours.bank, truth.bank, 1), rows, n);
  close(what, difference(ours.sums, truth.sums, 1), rows, n);
  close(what, difference(ours.scale, truth.scale, 1), map, n);
  close(what, difference(ours.shift, truth.shift, 1), map, n);
  close(what, difference(ours.mean, truth.mean), 1e-11, n);
  close(what, difference(ours.std, truth.std), 1e-11, n);
  close(what, difference(ours.stats, truth.stats, 1), 1e-9, n);
  const double variance = *ours.variance, expected = *truth.variance;
  require(variance == expected || std::fabs(variance - expected) <= 1e-9 * expected, what, n.B, n.M, n.D);
  close(what, difference(ours.innovation, truth.innovation, 1), 1e-11, n);
  require(equal(ours.ids, truth.ids) && equal(ours.steps, truth.steps), what, n.B, n.M, n.D);
  require(equal(ours.labels, truth.labels) && equal(ours.head, truth.head) && equal(ours.count, truth.count), what, n.B,
          n.M, n.D);
}

}  // namespace xbn
