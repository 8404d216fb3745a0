// The sweep of loss.cu with its products on tensor cores: one pass of it.
//
//   in     as loss.cu; rows of z and bank are multiples of 16 bytes long, and aligned to that
//   out    as loss.cu
//   math   as loss.cu; a product of floats is three in TF32, mma.cuh
//   grid   as loss.cu; what the warps of a block take is in loss_tensor.cuh
//   keeps  as loss.cu
//   needs  compute capability 8.0 (code for older GPUs is that of loss.cu); 36 to 42 KB of shared memory; no spills
//   order  as loss.cu
#include "loss_sweep.cuh"

namespace xbn::cuda {

int launch_tensor_pass(const MemoryLossParams<float, float>& p, const Pass& pass, const PartialLoss<float>& partial,
                       const SweepGrid& grid, const Launch& launch) {
  return launch_pass<true>(p, pass, partial, grid, true, launch);
}

}  // namespace xbn::cuda
