// Random inputs for the fuzzing programs. Every array is a heap block of exactly its size, so that a sanitizer sees one
// element too far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>

#include "../../csrc/math/losses.h"

template <typename T>
struct Exactly {
  explicit Exactly(int64_t n) : size(n), data(new T[std::max<int64_t>(n, 1)]()) {}
  operator T*() const { return size ? data.get() : nullptr; }
  int64_t size;
  std::unique_ptr<T[]> data;
};

inline std::mt19937_64 generator(1);

inline int64_t up_to(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n + 1)); }

template <typename T>
Exactly<T> normal(int64_t n, double spread = 1) {
  Exactly<T> x(n);
  std::normal_distribution<double> draw(0, spread);
  std::generate_n(x.data.get(), n, [&] { return static_cast<T>(draw(generator)); });
  return x;
}

inline Exactly<int64_t> labels(int64_t n, int64_t classes) {
  Exactly<int64_t> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = up_to(classes) - 2;
  return x;
}

inline Exactly<bool> mask(int64_t n) {
  Exactly<bool> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = up_to(3) > 0;
  return x;
}

template <typename T>
const T* sometimes(const Exactly<T>& x) {
  return up_to(1) ? x.data.get() : nullptr;
}

inline void require(bool ok, const char* what, int64_t B, int64_t M, int64_t D) {
  if (ok) return;
  std::fprintf(stderr, "%s: B=%lld M=%lld D=%lld\n", what, static_cast<long long>(B), static_cast<long long>(M),
               static_cast<long long>(D));
  std::abort();
}

// One of all losses. Exponents stay moderate, so that a sum is more than one pair and rounding.
inline xbn::LossSpec random_loss() {
  using xbn::Average;
  using xbn::LossKind;
  constexpr Average one = Average::anchors;
  const xbn::NamedLoss& known = xbn::kLosses[up_to(std::size(xbn::kLosses) - 1)];
  switch (known.kind) {
    case LossKind::contrastive: {
      constexpr Average averages[] = {Average::anchors, Average::pairs, Average::groups};
      const bool similar = known.distance == xbn::Distance::cosine;
      return of_distance({known.kind, averages[up_to(2)], similar ? 0.9 : 0.5, similar ? 0.1 : 1.2}, known.distance);
    }
    case LossKind::siglip: return {known.kind, one, 0.5, -1};
    case LossKind::supcon: return {known.kind, one, 0.5};
    case LossKind::ntxent: return {known.kind, one, 0.2};
    case LossKind::multi_similarity: return {known.kind, one, 2, 20, 0.3, up_to(1) ? 0.1 : -1.0};
    case LossKind::circle: return {known.kind, one, 0.4, 1};  // anchors are long: more would multiply what is rounded
    case LossKind::dcl: return {known.kind, one, 0.5};
    case LossKind::dclw: return {known.kind, one, 0.5, 0.8};
    case LossKind::nca: return {known.kind, one, 2};
    case LossKind::lifted_structure: return {known.kind, one, 0.9, 3};
    case LossKind::triplet:
    case LossKind::triplet_soft:
    case LossKind::triplet_all: return of_distance({known.kind, one, 0.3}, known.distance);
  }
  std::fprintf(stderr, "%s: no parameters to draw\n", known.name);
  std::abort();
}
