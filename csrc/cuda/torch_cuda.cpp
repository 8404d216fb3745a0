// Looked up in the libtorch_cuda that is already loaded: a CPU-only torch has none, and this library must load with
// it.
#include "torch_cuda.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../glue/contract.h"

namespace xbn::torch_cuda {
namespace {

template <typename Function>
Function find(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, name);
  check(symbol != nullptr, "xbn_ext: this torch has no CUDA support (", name, " not found)");
  return reinterpret_cast<Function>(symbol);
}

void succeed(AOTITorchError error, const char* what) {
  check(error == AOTI_TORCH_SUCCESS, "xbn_ext: ", what, " failed");
}

}  // namespace

DeviceGuard::DeviceGuard(const Tensor& on) : index_(on.get_device_index()) {
  DeviceGuardHandle guard = nullptr;
  succeed(aoti_torch_create_device_guard(index_, &guard), "setting the device");
  guard_ = guard;
}

DeviceGuard::~DeviceGuard() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto get = find<Function>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  succeed(get(device, &stream), "looking up the current stream");
  return stream;
}

void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  using Function = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
  static const auto mm = find<Function>("aoti_torch_cuda_mm_out");
  succeed(mm(out.get(), a.get(), b.get()), "matrix product");
}

void add_mm(const Tensor& sum, const Tensor& a, const Tensor& b) {
  using Function = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a,
                                      AtenTensorHandle b, double beta, double alpha);
  static const auto addmm = find<Function>("aoti_torch_cuda_addmm_out");
  succeed(addmm(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0), "matrix product");
}

}  // namespace xbn::torch_cuda
