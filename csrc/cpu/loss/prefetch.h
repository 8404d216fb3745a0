// Fetching memory that is needed next.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cpu.h"

namespace xbn {

// Memory that is fetched into the second-level cache a little at a time, during other work. More than a line at
// a time would wait for room in the processor's queue of misses.
class Prefetch {
 public:
  // steps: how often step() will be called, about.
  Prefetch(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)),
        end_(next_ + bytes),
        step_(std::min<int64_t>(ceil_div(bytes, steps), kLine)) {}
  void step() {
    __builtin_prefetch(next_, 0, 2);
    next_ = end_ - next_ > step_ ? next_ + step_ : end_;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  const char* end_;
  int64_t step_;
};

}  // namespace xbn
