// The CUDA backend of xbn_ext with its kernels executed on the CPU, as torch.ops.xbn_emu: the very glue and kernels of
// csrc/cuda. As a Python module it controls the executor.
#include <executor.h>
#include <pybind11/pybind11.h>

PYBIND11_MODULE(xbn_emu, m) {
  m.def(
      "set_seed", [](std::uint64_t seed) { emu::settings().seed = seed; }, pybind11::arg("seed"),
      "Order of blocks and threads: 0, by index; else drawn from the seed.");
  m.def(
      "set_multiprocessors", [](int n) { emu::settings().multiprocessors = n; }, pybind11::arg("n"),
      "How many multiprocessors the device says it has.");
  m.def(
      "set_launch_error", [](int error) { emu::settings().launch_error = error; }, pybind11::arg("error"),
      "The CUDA error that every launch fails with; 0: none.");
  m.def("launches", [] { return emu::settings().launches; }, "Kernels launched so far.");
}
