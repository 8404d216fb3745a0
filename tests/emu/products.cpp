#include "products.h"

template <typename T>
void multiply_transposed(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < k; ++d) sum += a[i * k + d] * b[j * k + d];
      out[i * m + j] = sum;
    }
}

template <typename T>
void add_product(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t d = 0; d < k; ++d) out[i * k + d] += a[i * m + j] * b[j * k + d];
}

template void multiply_transposed(const float*, const float*, int64_t, int64_t, int64_t, float*);
template void multiply_transposed(const double*, const double*, int64_t, int64_t, int64_t, double*);
template void add_product(const float*, const float*, int64_t, int64_t, int64_t, float*);
template void add_product(const double*, const double*, int64_t, int64_t, int64_t, double*);
