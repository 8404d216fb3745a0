// enqueue_: the rows of z that are in the mask and finite enter the ring, oldest rows leave.
//
//   in       z [B, D], labels [B], mask and ids [B] or null, step [1]; scale, shift [D] of the pending map
//   in, out  bank [rows, D], which is slots [first, first + rows) of a ring of M, bank_labels [rows], bank_ids and
//            bank_steps [rows] or null, sums [2, D], head [1], count [1]
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

// Fills `slots` and returns the rows to store, in ring order: of those that may be. Moves the ring on.
template <typename T, typename S>
std::vector<int64_t> assign_slots(const EnqueueParams<T, S>& p, const std::vector<char>& may_be_stored) {
  std::vector<int64_t> rows;
  rows.reserve(p.B);
  for (int64_t i = 0; i < p.B; ++i)
    if (may_be_stored[i]) rows.push_back(i);
  const int64_t surplus = static_cast<int64_t>(rows.size()) - p.M;
  if (surplus > 0) rows.erase(rows.begin(), rows.begin() + surplus);
  std::fill(p.slots, p.slots + p.B, int64_t{-1});
  const int64_t n = static_cast<int64_t>(rows.size());
  for (int64_t k = 0; k < n; ++k) p.slots[rows[k]] = (*p.head + k) % p.M;
  *p.head = (*p.head + n) % p.M;
  *p.count = std::min(*p.count + n, p.M);
  return rows;
}

}  // namespace

#define XBN_ISA_SOURCE "enqueue_kernel.h"
#include "for_each_isa.h"

template <typename T, typename S>
void enqueue(const EnqueueParams<T, S>& p, const Cpu& cpu) {
  const int64_t work = 2 * p.B * p.D;
  std::vector<S> u(p.B * p.D);
  std::vector<char> may_be_stored(p.B, 0);
  cpu.parallel(p.B, work, [&](int64_t i) {
    if (is_marked(p.mask, i)) XBN_CALL_ISA(cpu.isa, pull_back(p, i, u.data() + i * p.D, &may_be_stored[i]));
  });
  const int64_t filled = *p.count;
  std::vector<int64_t> rows = assign_slots(p, may_be_stored);
  const auto is_elsewhere = [&](int64_t i) { return p.slots[i] < p.first || p.slots[i] >= p.first + p.rows; };
  rows.erase(std::remove_if(rows.begin(), rows.end(), is_elsewhere), rows.end());
  cpu.parallel(ceil_div(p.D, kStripe), work, [&](int64_t stripe) {
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, p.D);
    XBN_CALL_ISA(cpu.isa, replace_rows(p, u.data(), rows.data(), rows.size(), filled, begin, end));
  });
  for (const int64_t i : rows) {
    const int64_t slot = p.slots[i], row = slot - p.first;
    p.bank_labels[row] = p.labels[i];
    if (p.bank_ids != nullptr) p.bank_ids[row] = stored_id(p.ids, i, slot);
    if (p.bank_steps != nullptr) p.bank_steps[row] = *p.step;
  }
}

#define XBN_INSTANTIATE(S, ...)                                      \
  template void enqueue(const EnqueueParams<float, S>&, const Cpu&); \
  template void enqueue(const EnqueueParams<double, S>&, const Cpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn
