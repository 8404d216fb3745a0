// The CUDA backend: gives the kernels the device they are to run on, its stream, temporary memory and torch's matrix
// products. Nothing here waits for the GPU, and nothing is linked to it: what torch's CUDA side offers is looked up
// when it is first used, so that the library also loads with a torch without CUDA.
#include "../glue/ops.h"
#include "gpu.h"
#include "torch_cuda.h"

namespace xbn {
namespace {

// All that torch gives to the kernels of one call, until its end.
class TorchGpu : public cuda::Gpu {
 public:
  explicit TorchGpu(const Tensor& on) : like_(on) {}

  void* workspace(int64_t bytes) const override {
    kept_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return kept_.back().mutable_data_ptr();
  }

 private:
  void multiply_transposed(const Product& p) const override {
    Tensor rows = matrix(p.b, p.m, p.k, p.float64);
    rows = torch::stable::transpose(rows, 0, 1);
    torch_cuda::mm_out(matrix(p.out, p.n, p.m, p.float64), matrix(p.a, p.n, p.k, p.float64), rows);
  }
  void add_product(const Product& p) const override {
    torch_cuda::add_mm(matrix(p.out, p.n, p.k, p.float64), matrix(p.a, p.n, p.m, p.float64),
                       matrix(p.b, p.m, p.k, p.float64));
  }

  // A dense matrix in memory that is kept elsewhere.
  Tensor matrix(const void* data, int64_t rows, int64_t columns, bool float64) const {
    const ScalarType dtype = float64 ? ScalarType::Double : ScalarType::Float;
    return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {columns, 1}, like_.device(), dtype);
  }

  Tensor like_;
  mutable std::vector<Tensor> kept_;
};

class CudaDevice {
 public:
  CudaDevice(const char* op, const Tensor& on) : guard_(on), gpu_(on) {
    gpu_.op = op;
    succeed(cuda::use_device(guard_.index(), &gpu_));
    gpu_.stream = torch_cuda::current_stream(guard_.index());
  }

  // Reading a counter would make the host wait; the kernels keep a damaged one within the bank.
  void check_counter(const char*, const Tensor&, int64_t) const {}

  template <typename T, typename S>
  void check_way(const MemoryLossParams<T, S>& p, const LossSpec& loss) const {
    cuda::check_way(p, loss, gpu_);
  }

  template <typename Kernel>
  void run(const Kernel& kernel) const {
    succeed(kernel(gpu_));
  }

  void multiply(const Tensor& a, const Tensor& b, const Tensor& out) const { torch_cuda::mm_out(out, a, b); }

 private:
  void succeed(int error) const {
    if (error == 0) return;
    check(!cuda::is_insufficient_driver(error), gpu_.op,
          ": the NVIDIA driver is older than the CUDA toolkit that xbn_ext was built with: update the driver, or build "
          "xbn_ext from source with the toolkit of your torch (XBN_CUDA=1)");
    check(!cuda::is_missing_kernel(error), gpu_.op, ": this build of xbn_ext has kernels for ", cuda::architectures(),
          " and none for this GPU (compute capability ", gpu_.capability / 10, ".", gpu_.capability % 10,
          "): build it from source with XBN_CUDA=1 XBN_CUDA_ARCHS=", gpu_.capability);
    check(false, gpu_.op, ": CUDA error ", error, ": ", cuda::error_string(error));
  }

  torch_cuda::DeviceGuard guard_;
  TorchGpu gpu_;
};

std::string architectures() { return cuda::architectures(); }

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, XBN_CUDA_KEY, m) { xbn::glue::register_ops<xbn::CudaDevice>(m); }
XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&xbn::architectures));
}
