// Batch rows enter the ring.
#pragma once

#include "../params.h"
#include "parallel.h"

namespace xbn {

template <typename T, typename S>
void enqueue(const EnqueueParams<T, S>& p, ParallelFor parallel);

}  // namespace xbn
