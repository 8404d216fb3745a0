// How fast this processor multiplies and adds at best, which is what the benchmark divides by.
#pragma once

#include "cpu.h"

namespace xbn {

struct Peak {
  double flops;   // floating-point operations done, an addition and a multiplication each counting as one
  double result;  // mean of all lanes: 1
};

// Multiply-adds of T (float or double) in registers alone, `rounds` of each accumulator on each of `threads` threads.
template <typename T>
Peak peak_fma(int64_t threads, int64_t rounds, const Cpu& cpu);

}  // namespace xbn
