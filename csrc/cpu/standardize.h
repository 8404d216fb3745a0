// Keeps the stored coordinates of a deferred bank near mean 0 and standard deviation 1.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename S>
void standardize(const StandardizeParams<S>& p, const Cpu& cpu);

}  // namespace xbn
