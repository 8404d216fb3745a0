// The CPU backend: hands the params of each op to its kernel.
#include <atomic>

#include "../glue/ops.h"
#include "enqueue.h"
#include "loss/batch_loss.h"
#include "loss/memory_loss.h"
#include "moments.h"
#include "normalize.h"
#include "peak.h"
#include "standardize.h"
#include "track.h"
#include "transform.h"

namespace xbn {
namespace {

// Every thread takes the next unit left, whatever range torch planned for it: so a thread on a busy core, or with more
// work in its units, does not keep the others waiting.
void parallel(int64_t units, const std::function<void(int64_t)>& unit) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < units; i = next++) unit(i);
  });
}

class CpuDevice {
 public:
  // The instruction set is looked up here, before any thread starts, so that a bad XBN_CPU_ISA is reported as
  // such.
  CpuDevice(const char* op, const Tensor&) : op_(op), cpu_{cpu_isa(), parallel} {}

  // Counters of a memory. Reading them is free here, so a damaged one is an error and not a wild write.
  void check_counter(const char* name, const Tensor& t, int64_t last) const {
    const int64_t value = *t.const_data_ptr<int64_t>();
    check(0 <= value && value <= last, op_, ": ", name, " must be within [0, ", last, "], got ", value);
  }

  template <typename T>
  void normalize(const NormalizeParams<T>& p) const {
    xbn::normalize(p, cpu_);
  }
  template <typename T>
  void normalize_backward(const NormalizeBackwardParams<T>& p) const {
    xbn::normalize_backward(p, cpu_);
  }
  template <typename T>
  void moments(const MomentsParams<T>& p) const {
    xbn::moments(p, cpu_);
  }
  template <typename T>
  void track(const MomentsParams<T>& m, const TrackParams& p) const {
    xbn::moments(m, cpu_);
    xbn::track(p);
  }
  template <typename S>
  void transform(const TransformParams<S>& p) const {
    xbn::transform(p, cpu_);
  }
  template <typename S>
  void standardize(const StandardizeParams<S>& p) const {
    xbn::standardize(p, cpu_);
  }
  template <typename T, typename S>
  void enqueue(const EnqueueParams<T, S>& p) const {
    xbn::enqueue(p, cpu_);
  }
  template <typename T, typename S>
  void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Tensor&) const {
    xbn::memory_loss(p, loss, cpu_);
  }
  template <typename T, typename S>
  void transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                             const Tensor&) const {
    xbn::transform_memory_loss(t, p, loss, cpu_);
  }
  template <typename T>
  void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss) const {
    xbn::batch_loss(p, loss, cpu_);
  }

 private:
  const char* op_;
  Cpu cpu_;
};

std::tuple<double, double> peak(int64_t threads, int64_t rounds, bool float64) {
  check_peak_fma(threads, rounds);
  const Cpu cpu{cpu_isa(), parallel};
  const Peak peak = float64 ? peak_fma<double>(threads, rounds, cpu) : peak_fma<float>(threads, rounds, cpu);
  return {peak.flops, peak.result};
}

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CPU, m) { XBN_REGISTER_OPS(m, xbn::CpuDevice); }
XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) { m.impl("_peak_fma", TORCH_BOX(&xbn::peak)); }
