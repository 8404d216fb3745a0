// How kernels ask for threads. The kernels know nothing of torch; the glue hands them its thread pool.
#pragma once

#include <cstdint>
#include <functional>

namespace xbn {

// Calls unit(0) … unit(units - 1), each exactly once, on any threads, and returns when all are done.
using ParallelFor = void (*)(int64_t units, const std::function<void(int64_t)>& unit);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace xbn
