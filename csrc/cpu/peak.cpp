// peak_fma: the multiply-adds a second that the kernels could reach if they waited for nothing.
//
//   math   x = factor x + term, again and again, in every lane of independent accumulators; 1 stays 1
//   split  the same on every thread
#include "peak.h"

#include <limits>
#include <vector>

namespace xbn {

#define XBN_ISA_SOURCE "peak_kernel.h"
#include "for_each_isa.h"

template <typename T>
Peak peak_fma(int64_t threads, int64_t rounds, const Cpu& cpu) {
  volatile T half = T(0.5);  // the compiler must not see that x stays 1
  const T factor = half, term = half;
  std::vector<Peak> of(threads);
  cpu.parallel(threads, std::numeric_limits<int64_t>::max(),
               [&](int64_t i) { XBN_CALL_ISA(cpu.isa, multiply_add(rounds, factor, term, &of[i])); });
  Peak total = {0, 0};
  for (const Peak& peak : of) {
    total.flops += peak.flops;
    total.result += peak.result / static_cast<double>(threads);
  }
  return total;
}

template Peak peak_fma<float>(int64_t, int64_t, const Cpu&);
template Peak peak_fma<double>(int64_t, int64_t, const Cpu&);

}  // namespace xbn
