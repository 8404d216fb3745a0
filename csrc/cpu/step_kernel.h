// Compiled once per instruction set: see for_each_isa.h.
#include "normalize_kernel.h"

// out = weight * a, or + weight * a; nothing and zeros, where a is null.
template <typename A, typename T>
void add_weighted(double weight, const A* a, int64_t D, bool first, T* out) {
  if (a == nullptr) {
    for (int64_t d = 0; first && d < D; ++d) out[d] = 0;
    return;
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    const double term = weight * static_cast<double>(a[d]);
    out[d] = static_cast<T>(first ? term : static_cast<double>(out[d]) + term);
  }
}

template <typename T>
void mean_gradient(const StepTotalParams<T>& p) {
  std::fill_n(p.mean_gradient, p.D, 0.0);
  int64_t count = 0;
  for (int64_t i = 0; i < p.B; ++i) {
    if (!is_marked(p.anchors, i)) continue;
    const T *grad = p.grad_memory + i * p.D, *z = p.ranking + i * p.D;
    double product = 0, squared = 0;
#pragma omp simd reduction(+ : product, squared)
    for (int64_t d = 0; d < p.D; ++d) {
      product += static_cast<double>(grad[d]) * static_cast<double>(z[d]);
      squared += static_cast<double>(z[d]) * static_cast<double>(z[d]);
    }
    const double along = part_along(product, squared);
    if (std::isnan(along)) continue;  // or one anchor that is not finite would spoil all
    ++count;
    p.along[i] = along;
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d)
      p.mean_gradient[d] += static_cast<double>(grad[d]) - along * static_cast<double>(z[d]);
  }
  for (int64_t d = 0; d < p.D; ++d) p.mean_gradient[d] /= static_cast<double>(std::max<int64_t>(count, 1));
}

template <typename T>
void total_gradients(const StepTotalParams<T>& p, int64_t begin, int64_t end) {
  const auto row = [&](const T* matrix, int64_t i) { return matrix == nullptr ? nullptr : matrix + i * p.D; };
  for (int64_t i = begin; i < end; ++i) {
    T* grad = p.grad + i * p.D;
    add_weighted(p.memory_weight, row(p.grad_memory, i), p.D, true, grad);
    if (p.grad_memory != nullptr && p.mean_gradient != nullptr && is_marked(p.anchors, i))
      add_weighted(-p.memory_weight, p.mean_gradient, p.D, false, grad);
    add_weighted(p.own_weight, row(p.own_anchors, i), p.D, false, grad);
    if (p.grad_rows != nullptr)
      add_weighted(p.own_weight, row(p.own_rows, i), p.D, true, p.grad_rows + i * p.D);
    else
      add_weighted(p.own_weight, row(p.own_rows, i), p.D, false, grad);
  }
  if (p.norm != nullptr)
    normalize_rows_backward(NormalizeBackwardParams<T>{p.grad, p.z, p.norm, p.B, p.D, p.eps, p.grad}, begin, end);
}
