// The CUDA backend of xbn_ext with its kernels executed on the CPU, as torch.ops.xbn_emu: the same glue and kernels as
// in csrc/cuda. As a Python module it controls the executor.
#include <executor.h>
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/loss/screen.cuh"

namespace {

using xbn::BFloat16;
using xbn::Float16;

// Tensors by the addresses of their data, 0: none. The bank is of S; with `moved`, of float32, its first *moved rows move.
template <typename S>
std::uint64_t screen(std::uintptr_t z, std::uintptr_t labels, std::uintptr_t bank, std::uintptr_t bank_labels,
                     std::uintptr_t count, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t anchors,
                     std::uintptr_t moved, std::int64_t B, std::int64_t M, std::int64_t D, bool renormalize, double eps,
                     float margin, bool bounded, std::uintptr_t mask) {
  xbn::MemoryLossParams<float, S> p = {};
  p.z = reinterpret_cast<const float*>(z), p.labels = reinterpret_cast<const std::int64_t*>(labels);
  p.bank = reinterpret_cast<const S*>(bank), p.bank_labels = reinterpret_cast<const std::int64_t*>(bank_labels);
  p.count = reinterpret_cast<const std::int64_t*>(count), p.anchors = reinterpret_cast<const bool*>(anchors);
  p.scale = reinterpret_cast<const double*>(scale), p.shift = reinterpret_cast<const double*>(shift);
  p.B = B, p.M = M, p.D = D, p.renormalize = renormalize, p.eps = eps;
  xbn::TransformParams<S> moving = {};
  if (moved != 0) {
    moving.bank = reinterpret_cast<S*>(bank), moving.count = reinterpret_cast<const std::int64_t*>(moved);
    moving.scale = reinterpret_cast<double*>(scale), moving.shift = reinterpret_cast<double*>(shift);
    p.scale = p.shift = nullptr;
  }
  xbn::cuda::Gpu gpu;
  gpu.multiprocessors = emu::settings().multiprocessors;
  unsigned long long found = 0;
  const auto bound = bounded ? xbn::cuda::screen_bound(D) : xbn::cuda::ScreenBound{};
  const int error = xbn::cuda::launch_screen(moved != 0 ? &moving : nullptr, p, margin, bound,
                                             {reinterpret_cast<std::uint32_t*>(mask), &found, nullptr}, gpu);
  if (error != 0) throw std::runtime_error(xbn::cuda::error_string(error));
  return found;
}

}  // namespace

PYBIND11_MODULE(xbn_emu, m) {
  m.def(
      "set_seed", [](std::uint64_t seed) { emu::settings().seed = seed; }, pybind11::arg("seed"),
      "Order of blocks and threads: 0, by index; else drawn from the seed.");
  m.def(
      "set_multiprocessors", [](int n) { emu::settings().multiprocessors = n; }, pybind11::arg("n"),
      "How many multiprocessors the device says it has.");
  m.def(
      "set_shared_memory", [](int bytes) { emu::settings().shared_memory = bytes; }, pybind11::arg("bytes"),
      "How much of it the device says a block may ask for.");
  m.def(
      "set_launch_error", [](int error) { emu::settings().launch_error = error; }, pybind11::arg("error"),
      "The CUDA error that every launch fails with; 0: none.");
#define XBN_DEFINE(S, dtype, name) \
  m.def("screen_" #name, &screen<S>, "Fills a mask [B, ceil(M / 32)] of 32-bit words, returns how many bits are set.");
  XBN_FOR_EACH_FLOAT_BANK(XBN_DEFINE)
#undef XBN_DEFINE
  m.def("launches", [] { return emu::settings().launches; }, "Kernels launched so far.");
  m.def("products", [] { return emu::settings().products; }, "Matrix products asked of torch so far.");
}
