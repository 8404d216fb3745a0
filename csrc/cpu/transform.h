// The pending affine map, written into the bank.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename S>
void transform(const TransformParams<S>& p, const Cpu& cpu);

// Rows [0, count) of bank [M, D] become a * row + b; sums [2, D] out, of the rows as written.
template <typename S>
void rewrite_rows(S* bank, int64_t count, int64_t D, const double* a, const double* b, double* sums, const Cpu& cpu);

}  // namespace xbn
