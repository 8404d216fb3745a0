#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

namespace xbn {
namespace {

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

Isa best_isa() {
  static const Isa best = processor_has(Isa::avx512) ? Isa::avx512
                          : processor_has(Isa::avx2) ? Isa::avx2
                                                     : Isa::baseline;
  return best;
}

}  // namespace

std::string isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

Isa cpu_isa() {
  const char* forced = std::getenv("XBN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa_name(isa) != forced) continue;
    if (!processor_has(isa))
      throw std::runtime_error("XBN_CPU_ISA=" + isa_name(isa) + ": this processor does not have it");
    return isa;
  }
  throw std::runtime_error("XBN_CPU_ISA must be avx512, avx2 or baseline, got '" + std::string(forced) + "'");
}

}  // namespace xbn
