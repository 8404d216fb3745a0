// The part of PyTorch that the glue uses: the stable ABI, which one binary shares with every torch >= 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The tests build the CUDA backend a second time, with kernels that run on the CPU, and register it under another name.
#ifndef XBN_LIBRARY
#define XBN_LIBRARY xbn_ext
#define XBN_CUDA_KEY CUDA
#endif

// torch's macros, once their arguments are expanded: torch 2.10 makes a string of the name of a library as it stands.
#define XBN_TORCH_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define XBN_TORCH_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace xbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace xbn
