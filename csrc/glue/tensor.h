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

// torch's macro, once its arguments are expanded: torch 2.10 makes a string of the name of a library as it stands.
#define XBN_TORCH_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace xbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor as_dense(const Tensor& t) { return torch::stable::contiguous(t); }

// An optional tensor as dense data: keeps the dense copy alive as long as its pointer is used.
struct Dense {
  Dense() = default;
  explicit Dense(const OptionalTensor& t) {
    if (t) tensor = as_dense(*t);
  }
  template <typename T>
  const T* data() const {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
  }
  OptionalTensor tensor;
};

// The numbers of a tensor, of a type that stands for its dtype. torch knows a 16-bit type by another name, so the
// pointer goes by way of void.
template <typename T>
struct Type {
  using type = T;
};

template <typename T>
T* data_of(const Tensor& t, Type<T>) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* data_in(const Tensor& t, Type<T>) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Of a tensor that may be missing.
template <typename T>
T* data_of(const OptionalTensor& t) {
  return t ? t->mutable_data_ptr<T>() : nullptr;
}
template <typename T>
const T* data_in(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace xbn
