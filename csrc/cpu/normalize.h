// Rows of a batch made of unit length, and the gradient through that.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename T>
void normalize(const NormalizeParams<T>& p, const Cpu& cpu);

template <typename T>
void normalize_backward(const NormalizeBackwardParams<T>& p, const Cpu& cpu);

}  // namespace xbn
