// normalize, normalize_backward: the rows of a batch divided by their norms, and the derivative of that.
//
//   in     x [B, D];  backward: grad_z [B, D], z [B, D], norm [B]
//   out    z [B, D], norm [B] in double;  backward: grad_x [B, D]
//   math   z = x / max(norm, eps);  grad_x = (grad_z - z (z . grad_z)) / norm, or grad_z / eps of a row below eps.
//          Computed in double: the squares of a finite float neither overflow nor vanish. A row with a NaN is NaN, one
//          with an Inf has NaN in its place and 0 elsewhere, the gradient of both is NaN, as PyTorch has it
//   split  runs of rows, each row summed by itself: the same bits on any number of threads
#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "../math/formulas.h"
#include "cpu.h"

namespace xbn {
namespace {
constexpr int64_t kElements = 1 << 14;  // of a unit: a few microseconds
}

#define XBN_ISA_SOURCE "normalize_kernel.h"
#include "for_each_isa.h"

template <typename T>
void normalize(const NormalizeParams<T>& p, const Cpu& cpu) {
  const int64_t rows = ceil_div(kElements, p.D);
  cpu.parallel(ceil_div(p.B, rows), p.B * p.D / 2, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, normalize_rows(p, unit * rows, std::min((unit + 1) * rows, p.B)));
  });
}

template <typename T>
void normalize_backward(const NormalizeBackwardParams<T>& p, const Cpu& cpu) {
  const int64_t rows = ceil_div(kElements, p.D);
  cpu.parallel(ceil_div(p.B, rows), p.B * p.D / 2, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, normalize_rows_backward(p, unit * rows, std::min((unit + 1) * rows, p.B)));
  });
}

template void normalize(const NormalizeParams<float>&, const Cpu&);
template void normalize(const NormalizeParams<double>&, const Cpu&);
template void normalize_backward(const NormalizeBackwardParams<float>&, const Cpu&);
template void normalize_backward(const NormalizeBackwardParams<double>&, const Cpu&);

}  // namespace xbn
