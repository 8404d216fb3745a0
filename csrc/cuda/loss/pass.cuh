// One pass of the sweep, for both that run it: the sweep, and the screened loss, where the screen leaves too much.
#pragma once

#include "anchor.cuh"

namespace xbn::cuda {

// Blocks of anchors x splits of the bank (x slots).
struct SweepGrid {
  int64_t blocks, splits;
};

// As many blocks in all as run at once.
SweepGrid plan_sweep(int64_t B, int64_t M, int64_t D, int multiprocessors);

// `tensor`: its products on tensor cores. A bank of 16 bits has no others.
template <typename S>
int launch_sweep_pass(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
                      const SweepGrid& grid, bool tensor, const Gpu& gpu);

}  // namespace xbn::cuda
