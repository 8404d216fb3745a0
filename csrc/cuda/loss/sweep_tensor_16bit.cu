// The sweep of sweep_tensor.cu against a bank of 16 bits, whose values are floats from the moment that they are read.
#include "sweep.cuh"

namespace xbn::cuda {

template int launch_pass<true>(const MemoryLossParams<float, Float16>&, const Pass&, const PartialLoss<float>&,
                               const SweepGrid&, bool, const Gpu&);
template int launch_pass<true>(const MemoryLossParams<float, BFloat16>&, const Pass&, const PartialLoss<float>&,
                               const SweepGrid&, bool, const Gpu&);

}  // namespace xbn::cuda
