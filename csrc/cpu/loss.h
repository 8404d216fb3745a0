// Loss of a batch against the memory and its gradient, in one sweep over the bank.
#pragma once

#include "../formulas.h"
#include "../params.h"
#include "cpu.h"

namespace xbn {

// The plan for B anchors, `count` bank rows and dimension D of `element_size` bytes each.
SweepPlan plan_sweep(int64_t B, int64_t count, int64_t D, int64_t element_size);

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const Contrastive<T>& loss, const Cpu& cpu);

}  // namespace xbn
