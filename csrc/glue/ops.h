// Every op between torch and its kernels, a file each, written once for all devices: check, allocate, fill in the
// params, call. No arithmetic here. A Device (cpu/backend.cpp, cuda/backend.cpp) is made on entry; its `run` calls a
// function with what the kernels of kernels.h are called on: a Cpu or a cuda::Gpu.
#pragma once

#include "batch_loss.h"
#include "enqueue.h"
#include "memory_loss.h"
#include "memory_sums.h"
#include "moments.h"
#include "normalize.h"
#include "standardize.h"
#include "step.h"
#include "track.h"
#include "transform.h"

// The body of a STABLE_TORCH_LIBRARY_IMPL(xbn_ext, …, m).
#define XBN_REGISTER_OPS(m, Device)                                                         \
  do {                                                                                      \
    m.impl("normalize", TORCH_BOX(&xbn::glue::normalize<Device>));                          \
    m.impl("normalize_backward", TORCH_BOX(&xbn::glue::normalize_backward<Device>));        \
    m.impl("moments", TORCH_BOX(&xbn::glue::moments<Device>));                              \
    m.impl("track_", TORCH_BOX(&xbn::glue::track<Device>));                                 \
    m.impl("transform_", TORCH_BOX(&xbn::glue::transform<Device>));                         \
    m.impl("standardize_", TORCH_BOX(&xbn::glue::standardize<Device>));                     \
    m.impl("enqueue_", TORCH_BOX(&xbn::glue::enqueue<Device>));                             \
    m.impl("memory_loss", TORCH_BOX(&xbn::glue::memory_loss<Device>));                      \
    m.impl("transform_memory_loss_", TORCH_BOX(&xbn::glue::transform_memory_loss<Device>)); \
    m.impl("memory_sums", TORCH_BOX(&xbn::glue::memory_sums<Device>));                      \
    m.impl("settle_sums", TORCH_BOX(&xbn::glue::settle_sums<Device>));                      \
    m.impl("batch_loss", TORCH_BOX(&xbn::glue::batch_loss<Device>));                        \
    m.impl("batch_sums", TORCH_BOX(&xbn::glue::batch_sums<Device>));                        \
    m.impl("step_", TORCH_BOX(&xbn::glue::step<Device>));                                   \
  } while (false)
