// What transform shares with the ops that rewrite the bank besides it.
#pragma once

#include "../kernels.h"
#include "cpu.h"

namespace xbn {

// Rows [0, count) of bank [M, D] become a * row + b; sums [2, D] out, of the rows as written.
template <typename S>
void rewrite_rows(S* bank, int64_t count, int64_t D, const double* a, const double* b, double* sums, const Cpu& cpu);

}  // namespace xbn
