// Included inside namespace xbn: compiles the file XBN_ISA_SOURCE once per instruction set, each time in a
// namespace of its own:
//
//     #define XBN_ISA_SOURCE "transform_kernel.h"   // its path from this folder
//     #include "for_each_isa.h"
//
// then XBN_CALL_ISA(isa, f(x)) of cpu.h calls the right copy. The source may include only files that are
// compiled for an instruction set, too: the other *_kernel.h and pair_formulas.h. What else it needs is
// included before, outside the pragmas. An inline function of a standard header compiled for AVX-512 could
// otherwise be the copy that the linker keeps for everybody, and crash an older processor.
//
// No include guard: every kernel file includes this once with its own source.

#if defined(XBN_X86_ISAS)

#if defined(__clang__)
// clang-format would cut the literal in two, and _Pragma takes one.
// clang-format off
#define XBN_ISA_BEGIN_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\"))), apply_to = function)")
// clang-format on
#define XBN_ISA_BEGIN_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define XBN_ISA_END _Pragma("clang attribute pop")
#else
#define XBN_ISA_BEGIN_AVX512  \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512\")")
#define XBN_ISA_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define XBN_ISA_END _Pragma("GCC pop_options")
#endif

XBN_ISA_BEGIN_AVX512
namespace avx512 {
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#include XBN_ISA_SOURCE
}  // namespace avx512
XBN_ISA_END

XBN_ISA_BEGIN_AVX2
namespace avx2 {
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#include XBN_ISA_SOURCE
}  // namespace avx2
XBN_ISA_END

#undef XBN_ISA_BEGIN_AVX512
#undef XBN_ISA_BEGIN_AVX2
#undef XBN_ISA_END
#endif

namespace baseline {
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
#include XBN_ISA_SOURCE
}  // namespace baseline

#undef XBN_ISA_SOURCE
