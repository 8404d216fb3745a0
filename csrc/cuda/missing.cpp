// What a build without nvcc says of GPUs. It registers no op for them, so they get those of xbn_ext/plain.
#include "../glue/tensor.h"

namespace xbn {
namespace {

std::string architectures() { return ""; }

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&xbn::architectures));
}
