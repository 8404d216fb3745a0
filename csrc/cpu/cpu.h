// The processor as the kernels see it: its threads and its instruction set. The kernels know nothing of torch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>

#include "../math/formulas.h"

// Whether kernels are compiled for instruction sets above the baseline of x86, too. XBN_BASELINE_ONLY compiles sooner.
#if defined(__x86_64__) && !defined(XBN_BASELINE_ONLY)
#define XBN_X86_ISAS
#endif

namespace xbn {

enum class Isa { baseline, avx2, avx_vnni, avx512, avx512_vnni };  // from least to best; _vnni: for screen.h

bool has_isa(Isa isa);

// The best instruction set this processor has, or the one that the environment variable XBN_CPU_ISA names.
// Throws std::runtime_error if that is unknown or the processor lacks it.
Isa cpu_isa();

std::string isa_name(Isa isa);

// Calls unit(0) … unit(units - 1), each exactly once, on any threads, and returns when all are done. work: of all units,
// in nanoseconds of one thread, roughly: where there is little, other threads are not worth waking.
using ParallelFor = void (*)(int64_t units, int64_t work, const std::function<void(int64_t)>& unit);

// Whether a loss looks for the pairs that count before it computes similarities (loss/screen.h). always, for tests and
// measurements: and computes those alone, however many they are.
enum class Screening { automatic, never, always };

struct Cpu {
  Isa isa;
  ParallelFor parallel;
  Screening screening = Screening::automatic;
};

// An integer as wide as T, so that vectors of both have the same number of lanes.
template <typename T>
using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

}  // namespace xbn

// Calls the copy of a function that for_each_isa.h made for the instruction set `isa`.
#if defined(XBN_X86_ISAS)
#define XBN_CALL_ISA(isa, call)                                \
  do {                                                         \
    switch (isa) {                                             \
      case ::xbn::Isa::avx512_vnni:                            \
      case ::xbn::Isa::avx512: ::xbn::avx512::call; break;     \
      case ::xbn::Isa::avx_vnni:                               \
      case ::xbn::Isa::avx2: ::xbn::avx2::call; break;         \
      case ::xbn::Isa::baseline: ::xbn::baseline::call; break; \
    }                                                          \
  } while (false)
#else
#define XBN_CALL_ISA(isa, call) ::xbn::baseline::call
#endif
