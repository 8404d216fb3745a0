// Every op between torch and its kernels, a file for each file of ops in xbn_ext/ops/, written once for all devices:
// check, allocate, fill in the params, call. No arithmetic here. A Device (cpu/backend.cpp, cuda/backend.cpp) is made on
// entry; its `run` calls a function with what the kernels of kernels.h are called on: a Cpu or a cuda::Gpu.
#pragma once

#include "step.h"

namespace xbn::glue {

template <typename Device, typename Library>
void register_ops(Library& m) {
  register_batch_ops<Device>(m);
  register_bank_ops<Device>(m);
  register_loss_of_memory_ops<Device>(m);
  register_loss_of_batch_ops<Device>(m);
  register_step_ops<Device>(m);
}

}  // namespace xbn::glue
