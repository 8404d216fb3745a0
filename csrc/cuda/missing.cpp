// The CUDA backend of a build without nvcc: its errors say what to do.
#include "../glue/ops.h"

namespace xbn {
namespace {

struct MissingDevice {
  MissingDevice(const char* op, const Tensor&) {
    check(false, op,
          ": this build of xbn_ext has no CUDA kernels: keep embeddings and criterion on the CPU, or install the CUDA "
          "toolkit (nvcc) and build xbn_ext with XBN_CUDA=1");
  }
  void check_counter(const char*, const Tensor&, int64_t) const {}
  template <typename Ranking>
  void check_way(const Ranking&, const LossSpec&) const {}
  template <typename Kernel>
  void run(const Kernel&) const {}
  void multiply(const Tensor&, const Tensor&, const Tensor&) const {}
};

std::string architectures() { return ""; }

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, XBN_CUDA_KEY, m) { XBN_REGISTER_OPS(m, xbn::MissingDevice); }
XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&xbn::architectures));
}
