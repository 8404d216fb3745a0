// The sweep of sweep.cu with its products on tensor cores: one pass of it.
//
//   in     as sweep.cu; rows of z and bank are multiples of 16 bytes long, and aligned to that
//   out    as sweep.cu
//   math   as sweep.cu; a product of floats is three in TF32, mma.cuh
//   grid   as sweep.cu; what the warps of a block take is in products_tensor.cuh
//   keeps  as sweep.cu
//   needs  compute capability 8.0 (code for older GPUs does nothing); 36 to 42 KB of shared memory; no spills
//   order  as sweep.cu
#include "sweep.cuh"

namespace xbn::cuda {

template int launch_pass<true>(const MemoryLossParams<float, float>&, const Pass&, const PartialLoss<float>&,
                               const SweepGrid&, bool, const Gpu&);

}  // namespace xbn::cuda
