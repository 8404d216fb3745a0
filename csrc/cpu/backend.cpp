// The CPU backend: gives the kernels their threads and their instruction set.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>

#include "../glue/ops.h"
#include "../loss_way.h"
#include "cpu.h"
#include "peak.h"

namespace xbn {
namespace {

// On a busy machine a thread that is woken may wait for a core for milliseconds, and all others for it.
constexpr int64_t kWorthThreads = 100'000;  // nanoseconds

// Every thread takes the next unit left, whatever range torch planned for it: so a thread on a busy core, or with more
// work in its units, does not keep the others waiting.
void parallel(int64_t units, int64_t work, const std::function<void(int64_t)>& unit) {
  if (work < kWorthThreads) {
    for (int64_t i = 0; i < units; ++i) unit(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < units; i = next++) unit(i);
  });
}

Screening screening() {
  switch (loss_way()) {
    case LossWay::automatic:
    case LossWay::screen: return Screening::automatic;
    case LossWay::pairs: return Screening::always;
    case LossWay::simt:
    case LossWay::tensor:
    case LossWay::halves:
    case LossWay::composite: break;
  }
  return Screening::never;
}

class CpuDevice {
 public:
  // The instruction set is looked up here, before any thread starts, so that a bad XBN_CPU_ISA is reported as
  // such.
  CpuDevice(const char* op, const Tensor&) : op_(op), cpu_{cpu_isa(), parallel, screening()} {}

  // Counters of a memory. Reading them is free here, so a damaged one is an error and not a wild write.
  void check_counter(const char* name, const Tensor& t, int64_t last) const {
    const int64_t value = *t.const_data_ptr<int64_t>();
    check(0 <= value && value <= last, op_, ": ", name, " must be within [0, ", last, "], got ", value);
  }

  // Every loss goes any way.
  template <typename Ranking>
  void check_way(const Ranking&, const LossSpec&) const {}

  template <typename Kernel>
  void run(const Kernel& kernel) const {
    kernel(cpu_);
  }

  void multiply(const Tensor& a, const Tensor& b, const Tensor& out) const {
    check(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == AOTI_TORCH_SUCCESS, op_, ": matrix product failed");
  }

 private:
  const char* op_;
  Cpu cpu_;
};

std::tuple<double, double> peak(int64_t threads, int64_t rounds, bool float64) {
  check(threads >= 1, "_peak_fma: threads must be at least 1, got ", threads);
  check(rounds >= 1, "_peak_fma: rounds must be at least 1, got ", rounds);
  const Cpu cpu{cpu_isa(), parallel};
  const Peak peak = float64 ? peak_fma<double>(threads, rounds, cpu) : peak_fma<float>(threads, rounds, cpu);
  return {peak.flops, peak.result};
}

}  // namespace
}  // namespace xbn

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CPU, m) { xbn::glue::register_ops<xbn::CpuDevice>(m); }
XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) { m.impl("_peak_fma", TORCH_BOX(&xbn::peak)); }
