// The derivative of a normalised row, for the kernels that end with it: a block of kRowThreads threads to a row, a thread
// to every kRowThreads-th 16-byte vector of columns.
#pragma once

#include "../math/formulas.h"
#include "reduce.cuh"

namespace xbn::cuda {

constexpr int kRowThreads = 128;

// The sum over a row of a[d] * b[d]; in all threads of the block.
template <int kWidth, typename T>
__device__ double row_product(const T* a, const T* b, int64_t D) {
  using Columns = Vector<T, kWidth>;
  double sum = 0;
  for (int64_t d = threadIdx.x * kWidth; d < D; d += kRowThreads * kWidth) {
    const Columns of_a = *reinterpret_cast<const Columns*>(a + d), of_b = *reinterpret_cast<const Columns*>(b + d);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum += static_cast<double>(of_a.value[c]) * static_cast<double>(of_b.value[c]);
  }
  return BlockSums<kRowThreads, 1>({sum})[0];
}

// grad_x of a row, from grad_z, which it may overwrite: a thread reads and writes the same columns.
template <int kWidth, typename T>
__device__ void normalize_row_backward(const T* grad_z, const T* z, double norm, double eps, int64_t D, T* grad_x) {
  using Columns = Vector<T, kWidth>;
  const double product = row_product<kWidth>(grad_z, z, D);
  const double along = is_short(norm, eps) ? 0 : product, factor = inverse_length(norm, eps);
  for (int64_t d = threadIdx.x * kWidth; d < D; d += kRowThreads * kWidth) {
    Columns grad = *reinterpret_cast<const Columns*>(grad_z + d);
    const Columns its_z = *reinterpret_cast<const Columns*>(z + d);
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      grad.value[c] =
          static_cast<T>(factor * (static_cast<double>(grad.value[c]) - along * static_cast<double>(its_z.value[c])));
    *reinterpret_cast<Columns*>(grad_x + d) = grad;
  }
}

// How many elements of a row can be accessed at once, in all of these matrices; those that are null do not matter.
template <typename T>
bool in_vectors(int64_t D, std::initializer_list<const T*> matrices) {
  bool aligned = D * sizeof(T) % 16 == 0;
  for (const T* matrix : matrices) aligned = aligned && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
  return aligned;
}

}  // namespace xbn::cuda
