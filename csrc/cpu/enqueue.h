// Batch rows enter the ring.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename T, typename S>
void enqueue(const EnqueueParams<T, S>& p, const Cpu& cpu);

}  // namespace xbn
