// Mean and standard deviation of a batch, per dimension.
#pragma once

#include "../params.h"
#include "cpu.h"

namespace xbn {

template <typename T>
void moments(const MomentsParams<T>& p, const Cpu& cpu);

}  // namespace xbn
