// Loss of a batch against the memory and its gradient, in one sweep over the bank.
#pragma once

#include "../losses.h"
#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu);

}  // namespace xbn
