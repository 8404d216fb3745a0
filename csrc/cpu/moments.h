// Mean and standard deviation of a batch, per dimension.
#pragma once

#include "../params.h"
#include "parallel.h"

namespace xbn {

template <typename T>
void moments(const MomentsParams<T>& p, ParallelFor parallel);

}  // namespace xbn
