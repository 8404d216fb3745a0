// What csrc/cuda/torch_cuda.cpp looks up in torch's CUDA side, on the CPU.
#include "../../csrc/cuda/torch_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../../csrc/glue/contract.h"
#include "executor.h"

namespace xbn::torch_cuda {

DeviceGuard::DeviceGuard(const Tensor&) : index_(0), guard_(nullptr) {}
DeviceGuard::~DeviceGuard() {}

void* current_stream(int) { return nullptr; }

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  ++emu::settings().products;
  check(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == AOTI_TORCH_SUCCESS, "matrix product failed");
}

void add_mm(const Tensor& sum, const Tensor& a, const Tensor& b) {
  check(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0) == AOTI_TORCH_SUCCESS,
        "matrix product failed");
}

}  // namespace xbn::torch_cuda
