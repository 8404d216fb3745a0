// Which instruction set the CPU kernels use, decided at run time.
#pragma once

#include <string>

namespace xbn {

enum class Isa { baseline, avx2, avx512 };

// The best set this processor has, or the one that the environment variable XBN_CPU_ISA names.
// Throws std::runtime_error if that is unknown or the processor lacks it.
Isa cpu_isa();

std::string isa_name(Isa isa);

}  // namespace xbn

// Calls xbn::<isa>::call for the instruction set in use.
#if defined(__x86_64__)
#define XBN_CALL_ISA(call)                                     \
  do {                                                         \
    switch (::xbn::cpu_isa()) {                                \
      case ::xbn::Isa::avx512: ::xbn::avx512::call; break;     \
      case ::xbn::Isa::avx2: ::xbn::avx2::call; break;         \
      case ::xbn::Isa::baseline: ::xbn::baseline::call; break; \
    }                                                          \
  } while (false)
#else
#define XBN_CALL_ISA(call) ::xbn::baseline::call
#endif
