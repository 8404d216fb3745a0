// Loss of a batch against itself and its gradient.
#pragma once

#include "../../math/losses.h"
#include "../../params.h"
#include "../cpu.h"

namespace xbn {

template <typename T>
void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Cpu& cpu);

}  // namespace xbn
