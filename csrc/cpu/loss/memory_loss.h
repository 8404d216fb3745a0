// Loss of a batch against the memory and its gradient, in one sweep over the bank.
#pragma once

#include "../../math/losses.h"
#include "../../params.h"
#include "../cpu.h"

namespace xbn {

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu);

// transform(t), then memory_loss(p) of the same bank; in one sweep if it can be.
template <typename T, typename S>
void transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                           const Cpu& cpu);

}  // namespace xbn
