// The CUDA backend: gives each op the device it is to run on, its stream and temporary memory, and launches it. Nothing
// here waits for the GPU, and nothing is linked to it: what torch's CUDA side offers is looked up when it is first
// used, so that the library also loads with a torch without CUDA.
#include "../glue/ops.h"
#include "kernels.h"
#include "torch_cuda.h"
#include "way.h"

namespace xbn {
namespace {

using cuda::Composite;
using cuda::Launch;

// From here on two library products beat the sweep: on an H200, in float32, they were slower with 256 anchors (1278 us
// to 978) and faster with 1024 (3358 to 3813). The screen beats both at every size measured. tools/gpu_check measures it.
constexpr int64_t kCompositeFrom = 512;  // anchors

// Beyond these the screen's mask, a bit for each pair, would take more than 256 MB.
constexpr int64_t kMostScreened = int64_t{1} << 31;  // pairs

class CudaDevice {
 public:
  CudaDevice(const char* op, const Tensor& on) : op_(op), like_(on), guard_(on) {
    succeed(cuda::use_device(guard_.index(), &info_));
    stream_ = torch_cuda::current_stream(guard_.index());
  }

  // Reading a counter would make the host wait; the kernels keep a damaged one within the bank.
  void check_counter(const char*, const Tensor&, int64_t) const {}

  template <typename T>
  void normalize(const NormalizeParams<T>& p) const {
    succeed(cuda::launch_normalize(p, launch_without_workspace()));
  }

  template <typename T>
  void normalize_backward(const NormalizeBackwardParams<T>& p) const {
    succeed(cuda::launch_normalize_backward(p, launch_without_workspace()));
  }

  template <typename T>
  void moments(const MomentsParams<T>& p) const {
    const Tensor memory = bytes(cuda::moments_workspace(p.B, p.D));
    succeed(cuda::launch_moments(p, launch(memory)));
  }

  template <typename T>
  void track(const MomentsParams<T>& m, const TrackParams& p) const {
    const Tensor memory = bytes(cuda::moments_workspace(m.B, m.D));
    succeed(cuda::launch_track(m, p, launch(memory)));
  }

  template <typename S>
  void transform(const TransformParams<S>& p) const {
    const Tensor memory = bytes(cuda::rewrite_workspace(p.M, p.D));
    succeed(cuda::launch_transform(p, launch(memory)));
  }

  template <typename S>
  void standardize(const StandardizeParams<S>& p) const {
    const Tensor memory = bytes(cuda::rewrite_workspace(p.M, p.D));
    succeed(cuda::launch_standardize(p, launch(memory)));
  }

  template <typename T, typename S>
  void enqueue(const EnqueueParams<T, S>& p) const {
    const Tensor memory = bytes(cuda::enqueue_workspace(p.B));
    succeed(cuda::launch_enqueue(p, launch(memory)));
  }

  template <typename T, typename S>
  void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Tensor& z) const {
    const LossWay way = way_of(p, loss);
    if (way == LossWay::composite) return composite(p, loss, z);
    if constexpr (kSinglePrecision<T, S>) fused(p, loss, way);
  }

  // One after the other: the transform also adds up every value that it writes, so it would not be free inside the sweep.
  template <typename T, typename S>
  void transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                             const Tensor& z) const {
    way_of(p, loss);  // throws before anything is written
    transform(t);
    memory_loss(p, loss, z);
  }

  template <typename T>
  void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss) const {
    const Tensor memory = bytes(cuda::batch_loss_workspace<T>(p.B, loss));
    succeed(cuda::launch_batch_loss(p, loss, launch(memory)));
  }

 private:
  template <typename T, typename S>
  static constexpr bool kSinglePrecision = std::is_same_v<T, float> && std::is_same_v<S, float>;

  // Which way the loss is computed: the one asked for, or by the shapes. Throws if that is impossible.
  template <typename T, typename S>
  LossWay way_of(const MemoryLossParams<T, S>& p, const LossSpec& loss) const {
    const LossWay wanted = loss_way();
    if (wanted == LossWay::composite) return wanted;
    const bool has_tensor_cores = info_.capability >= 80, is_contrastive = loss.kind == LossKind::contrastive;
    const bool can_sweep = kSinglePrecision<T, S> && p.D <= cuda::kSweepMaxDim && !goes_in_rounds(loss);
    if (wanted == LossWay::automatic) {
      const bool multiplies = can_sweep && has_tensor_cores && p.D % 4 == 0;
      if (multiplies && is_contrastive && p.B <= kMostScreened / (p.M > 0 ? p.M : 1)) return LossWay::screen;
      if (!can_sweep || p.B >= kCompositeFrom) return LossWay::composite;
      return multiplies ? LossWay::tensor : LossWay::simt;
    }
    const char* name = name_of(wanted);
    const bool screens = wanted == LossWay::screen || wanted == LossWay::pairs;
    check(!goes_in_rounds(loss), op_, ": backend '", name, "' does not have triplet_all");
    check(!screens || is_contrastive, op_, ": backend '", name, "' has contrastive losses only");
    check(can_sweep, op_, ": backend '", name, "' takes float32 embeddings and bank of at most ", cuda::kSweepMaxDim,
          " dimensions");
    check(wanted == LossWay::simt || has_tensor_cores, op_, ": backend '", name,
          "' needs a GPU of compute capability 8.0 or later, this one has ", info_.capability / 10, ".",
          info_.capability % 10);
    return wanted;
  }

  void fused(const MemoryLossParams<float, float>& p, const LossSpec& loss, LossWay way) const {
    const bool need_grad = p.grad_z != nullptr;
    if (way == LossWay::screen || way == LossWay::pairs) {
      const double most = way == LossWay::pairs ? 1.0 : cuda::kFew;
      const Tensor memory = bytes(cuda::screened_workspace(p.B, p.M, p.D, loss, need_grad, info_.multiprocessors));
      return succeed(cuda::launch_screened(p, loss, most, launch(memory)));
    }
    const Tensor memory = bytes(cuda::sweep_workspace(p.B, p.M, p.D, loss, need_grad, info_.multiprocessors));
    succeed(cuda::launch_sweep(p, loss, way == LossWay::tensor, launch(memory)));
  }

  template <typename T, typename S>
  void composite(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Tensor& z) const {
    Composite<T> c = cuda::plan_composite<T>(p.B, p.M, p.D, loss);
    const Tensor memory = bytes(cuda::composite_workspace(p.B, p.D, c));
    const Launch at = launch(memory);
    const Tensor rows = torch::stable::new_empty(z, {c.chunk, p.D});
    const Tensor weights = torch::stable::new_empty(z, {c.slots * p.B, c.chunk});
    const bool need_grad = p.grad_z != nullptr && sums_gradients(loss);
    Tensor grad = torch::stable::new_empty(z, {need_grad ? c.slots * p.B : 0, p.D});
    Tensor s = narrow(weights, 0, p.B), rows_transposed = rows;
    rows_transposed = torch::stable::transpose(rows_transposed, 0, 1);
    c.rows = rows.mutable_data_ptr<T>();
    c.s = weights.mutable_data_ptr<T>();
    c.grad = need_grad ? grad.mutable_data_ptr<T>() : nullptr;
    if (need_grad) torch::stable::zero_(grad);

    const Program program = make_program(loss, p.grad_z != nullptr);
    for (; c.round < c.rounds; ++c.round)
      for (int k = 0; k < program.passes; ++k) {
        const Pass& pass = program.pass[k];
        const int first = pass.slot[0].pairs == Pairs::none, last = pass.slot[1].pairs == Pairs::none ? 1 : 2;
        succeed(cuda::launch_composite_begin(p, pass, k, c, at));
        for (int64_t chunk = 0; chunk < c.chunks && p.B > 0 && p.M > 0; ++chunk) {
          succeed(cuda::launch_composite_rows(p, c, chunk * c.chunk, at));
          torch_cuda::mm_out(s, z, rows_transposed);
          succeed(cuda::launch_composite_score(p, pass, c, chunk * c.chunk, at));
          if (!need_grad || !pass.gradient) continue;
          Tensor of_slots = narrow(grad, first * p.B, (last - first) * p.B);
          torch_cuda::add_mm(of_slots, narrow(weights, first * p.B, (last - first) * p.B), rows);
        }
        succeed(cuda::launch_composite_end(p, loss, k, c, at));
      }
  }

  // A view of some rows.
  static Tensor narrow(Tensor t, int64_t first, int64_t rows) { return torch::stable::narrow(t, 0, first, rows); }

  Tensor bytes(int64_t n) const { return torch::stable::new_empty(like_, {n}, ScalarType::Byte); }

  Launch launch(const Tensor& memory) const { return {stream_, info_.multiprocessors, memory.mutable_data_ptr()}; }
  Launch launch_without_workspace() const { return {stream_, info_.multiprocessors, nullptr}; }

  void succeed(int error) const {
    if (error == 0) return;
    check(!cuda::is_insufficient_driver(error), op_,
          ": the NVIDIA driver is older than the CUDA toolkit that xbn_ext was built with: update the driver, or build "
          "xbn_ext from source with the toolkit of your torch (XBN_CUDA=1)");
    check(!cuda::is_missing_kernel(error), op_, ": this build of xbn_ext has kernels for ", cuda::architectures(),
          " and none for this GPU (compute capability ", info_.capability / 10, ".", info_.capability % 10,
          "): build it from source with XBN_CUDA=1 XBN_CUDA_ARCHS=", info_.capability);
    check(false, op_, ": CUDA error ", error, ": ", cuda::error_string(error));
  }

  const char* op_;
  Tensor like_;
  torch_cuda::DeviceGuard guard_;
  cuda::DeviceInfo info_ = {};
  void* stream_ = nullptr;
};

std::string architectures() { return cuda::architectures(); }

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, XBN_CUDA_KEY, m) { XBN_REGISTER_OPS(m, xbn::CudaDevice); }
XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&xbn::architectures));
}
