// The two products of the composite loss, in place of cuBLAS. All matrices are row-major and dense.
#pragma once

#include <cstdint>

// out [n, m] = a [n, k] times b [m, k] transposed.
template <typename T>
void multiply_transposed(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* out);

// out [n, k] += a [n, m] times b [m, k].
template <typename T>
void add_product(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* out);
