// The pending affine map, written into the bank.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

// Returns through `sums` [2, D] the sum and the sum of squares of the rows as written.
template <typename S>
void transform(const TransformParams<S>& p, double* sums, const Cpu& cpu);

}  // namespace xbn
