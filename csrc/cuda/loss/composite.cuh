// What the composite way lends to memory_sums: one pass of its own.
#pragma once

#include "anchor.cuh"
#include "way.h"

namespace xbn::cuda {

// Pass p.number of a loss without rounds. It leaves partial.sums of the slots that it fills, partial.state and, where
// p.grad_z is wanted and the pass adds one up, partial.grad (else null), all of one split. In composite.cu.
template <typename T, typename S>
int composite_pass(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu,
                   PartialLoss<T>* partial);

}  // namespace xbn::cuda
