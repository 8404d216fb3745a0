// What the glue needs of torch on a GPU.
#pragma once

#include "../glue/tensor.h"

namespace xbn::torch_cuda {

// Makes the device of a tensor torch's current one as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& on);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int index() const { return index_; }

 private:
  int index_;
  void* guard_;
};

// The stream that torch puts its own kernels on, a cudaStream_t.
void* current_stream(int device);

// out = a @ b and sum += a @ b, by the library torch uses and in the precision torch is set to
// (torch.backends.cuda.matmul).
void mm_out(const Tensor& out, const Tensor& a, const Tensor& b);
void add_mm(const Tensor& sum, const Tensor& a, const Tensor& b);

}  // namespace xbn::torch_cuda
