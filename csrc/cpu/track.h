// The drift model: where the moments of the embeddings are now, and the map that takes the bank there.
#pragma once

#include "../params.h"

namespace xbn {

void track(const TrackParams& p);

}  // namespace xbn
