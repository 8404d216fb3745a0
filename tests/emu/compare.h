// How far apart two arrays are, and what to do if that is too far.
#pragma once

#include <limits>

#include "../../csrc/math/half.h"
#include "../native/random_data.h"

namespace xbn {

struct Sizes {
  int64_t B, M, D;
};

// What 1 and the next larger number differ by: half of it is a tie, which rounds to the even 1.
template <typename S>
double find_unit() {
  double unit = 1;
  const auto rounded = [](double x) { return as<double>(static_cast<S>(static_cast<typename Compute<S>::type>(x))); };
  while (rounded(1 + unit / 2) != 1) unit /= 2;
  return unit;
}
template <typename S>
const double kUnit = find_unit<S>();

template <typename T>
Exactly<T> copy(const Exactly<T>& from) {
  Exactly<T> to(from.size);
  std::copy(from.data.get(), from.data.get() + from.size, to.data.get());
  return to;
}

template <typename From>
Exactly<double> doubles(const Exactly<From>& from) {
  Exactly<double> to(from.size);
  const From* const x = from;
  double* const y = to;
  for (int64_t i = 0; i < to.size; ++i) y[i] = as<double>(x[i]);
  return to;
}

// As `from`, every second element larger by so much of its size, the others smaller.
inline Exactly<double> touched(const Exactly<double>& from, double touch) {
  Exactly<double> to = copy(from);
  double* const x = to;
  for (int64_t k = 0; k < to.size; ++k) x[k] += (k % 2 ? touch : -touch) * x[k];
  return to;
}

// Largest difference over the largest value, or over `unit` if that is more; a NaN must be a NaN in both.
template <typename A, typename B>
double difference(const Exactly<A>& a, const Exactly<B>& b, double unit = 1e-300) {
  double largest = unit, off = 0;
  const A* const of_a = a;
  const B* const of_b = b;
  for (int64_t i = 0; i < a.size; ++i) {
    const double ours = as<double>(of_a[i]), truth = as<double>(of_b[i]);
    if (std::isnan(ours) != std::isnan(truth)) return INFINITY;
    if (std::isnan(ours)) continue;
    largest = std::max(largest, std::fabs(truth));
    off = std::max(off, std::fabs(ours - truth));
  }
  return off / largest;
}

inline void close(const char* what, double difference, double tolerance, const Sizes& n) {
  if (!(difference <= tolerance)) std::fprintf(stderr, "off by %g: ", difference);
  require(difference <= tolerance, what, n.B, n.M, n.D);
}

inline bool equal(const Exactly<int64_t>& a, const Exactly<int64_t>& b) {
  return std::equal(a.data.get(), a.data.get() + a.size, b.data.get());
}

}  // namespace xbn
