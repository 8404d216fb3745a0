// enqueue_: the rows of z that are in the mask and finite enter the ring, oldest rows leave.
//
//   in       z [B, D], labels [B], mask and ids [B] or null, step [1]; scale, shift [D] of the pending map
//   in, out  bank [M, D], bank_labels [M], bank_ids and bank_steps [M] or null, sums [2, D], head [1], count [1]
//   out      slots [B]: where each row went, -1 where it was not stored
//   math     stored as u = (z - shift) / scale, rounded to the bank's dtype: scale * u + shift is z again.
//            A row whose u is not finite (z was not, or it overflows the bank's dtype) is left out.
//            More rows than the ring holds: the last M of them stay.
//   split    stripes of columns, rows in order: the same bits on any number of threads
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "../math/formulas.h"
#include "cpu.h"

namespace xbn {
namespace {

constexpr int64_t kStripe = 64;

// What is stored of row i: u [D]. Returns whether all of it is finite.
template <typename T, typename S>
bool pull_back(const EnqueueParams<T, S>& p, int64_t i, S* u) {
  using C = typename Compute<S>::type;
  const T* z = p.z + i * p.D;
  double zero = 0;  // stays 0 as long as every value is finite
#pragma omp simd reduction(+ : zero)
  for (int64_t d = 0; d < p.D; ++d) {
    u[d] = static_cast<S>(static_cast<C>((static_cast<double>(z[d]) - p.shift[d]) / p.scale[d]));
    zero += 0.0 * as<double>(u[d]);
  }
  return zero == 0;
}

// Fills `slots` and returns the rows to store, in ring order: of those that may be.
template <typename T, typename S>
std::vector<int64_t> assign_slots(const EnqueueParams<T, S>& p, const std::vector<char>& may_be_stored) {
  std::vector<int64_t> rows;
  rows.reserve(p.B);
  for (int64_t i = 0; i < p.B; ++i)
    if (may_be_stored[i]) rows.push_back(i);
  const int64_t surplus = static_cast<int64_t>(rows.size()) - p.M;
  if (surplus > 0) rows.erase(rows.begin(), rows.begin() + surplus);
  std::fill(p.slots, p.slots + p.B, int64_t{-1});
  for (size_t k = 0; k < rows.size(); ++k) p.slots[rows[k]] = (*p.head + static_cast<int64_t>(k)) % p.M;
  return rows;
}

// Columns [begin, end) of a row go into the ring, and into the sums; those of the row that leaves go out of them.
template <typename S>
void replace(const S* u, bool evicts, int64_t begin, int64_t end, S* stored, double* sum, double* sum_squares) {
#pragma omp simd
  for (int64_t d = begin; d < end; ++d) {
    const double in = as<double>(u[d]), out = evicts ? as<double>(stored[d]) : 0.0;
    sum[d] += in - out;
    sum_squares[d] += in * in - out * out;
    stored[d] = u[d];
  }
}

}  // namespace

template <typename T, typename S>
void enqueue(const EnqueueParams<T, S>& p, const Cpu& cpu) {
  const int64_t work = 2 * p.B * p.D;
  std::vector<S> u(p.B * p.D);
  std::vector<char> may_be_stored(p.B, 0);
  cpu.parallel(p.B, work, [&](int64_t i) {
    if (p.mask == nullptr || p.mask[i]) may_be_stored[i] = pull_back(p, i, u.data() + i * p.D);
  });
  const std::vector<int64_t> rows = assign_slots(p, may_be_stored);
  const int64_t filled = *p.count;
  cpu.parallel(ceil_div(p.D, kStripe), work, [&](int64_t stripe) {
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, p.D);
    for (const int64_t i : rows)
      replace(u.data() + i * p.D, p.slots[i] < filled, begin, end, p.bank + p.slots[i] * p.D, p.sums, p.sums + p.D);
  });
  for (const int64_t i : rows) {
    const int64_t slot = p.slots[i];
    p.bank_labels[slot] = p.labels[i];
    if (p.bank_ids != nullptr) p.bank_ids[slot] = stored_id(p.ids, i, slot);
    if (p.bank_steps != nullptr) p.bank_steps[slot] = *p.step;
  }
  const int64_t n = static_cast<int64_t>(rows.size());
  *p.head = (*p.head + n) % p.M;
  *p.count = std::min(filled + n, p.M);
}

#define XBN_INSTANTIATE(S, ...)                                      \
  template void enqueue(const EnqueueParams<float, S>&, const Cpu&); \
  template void enqueue(const EnqueueParams<double, S>&, const Cpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn
