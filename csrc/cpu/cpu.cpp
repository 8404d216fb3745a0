#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(XBN_X86_ISAS)
#include <cpuid.h>
#endif

namespace xbn {

bool has_isa(Isa isa) {
#if defined(XBN_X86_ISAS)
  if (isa == Isa::avx512_vnni) return has_isa(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx_vnni) {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    return has_isa(Isa::avx2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

namespace {

constexpr Isa kBestFirst[] = {Isa::avx512_vnni, Isa::avx512, Isa::avx_vnni, Isa::avx2, Isa::baseline};

#if defined(__aarch64__)
constexpr const char* kBaselineName = "neon";
#else
constexpr const char* kBaselineName = "baseline";
#endif

Isa best_isa() {
  static const Isa best = *std::find_if(std::begin(kBestFirst), std::end(kBestFirst), has_isa);
  return best;
}

}  // namespace

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx_vnni: return "avx_vnni";
    case Isa::avx2: return "avx2";
    case Isa::baseline: break;
  }
  return kBaselineName;
}

Isa cpu_isa() {
  const char* forced = std::getenv("XBN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  for (const Isa isa : kBestFirst) {
    if (isa_name(isa) != forced) continue;
    if (!has_isa(isa)) throw std::runtime_error("XBN_CPU_ISA=" + isa_name(isa) + ": this processor does not have it");
    return isa;
  }
  throw std::runtime_error("XBN_CPU_ISA must be avx512_vnni, avx512, avx_vnni, avx2 or " + isa_name(Isa::baseline) +
                           ", got '" + forced + "'");
}

}  // namespace xbn
