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

// Whether z and bank can be read by 16 bytes.
inline bool is_wide(const MemoryLossParams<float, float>& p) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return p.D % 4 == 0 && aligned(p.z) && aligned(p.bank);
}

// `tensor`: its products on tensor cores, if they can be read so.
int launch_sweep_pass(const MemoryLossParams<float, float>& p, const Pass& pass, const PartialLoss<float>& partial,
                      const SweepGrid& grid, bool tensor, const Gpu& gpu);

}  // namespace xbn::cuda
