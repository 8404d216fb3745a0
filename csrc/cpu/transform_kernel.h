// Compiled once per instruction set: see for_each_isa.h.

template <typename S, typename C>
void transform_rows(S* __restrict__ bank, int64_t rows, int64_t D, const C* __restrict__ scale,
                    const C* __restrict__ shift, double* __restrict__ sum, double* __restrict__ sum_squares) {
  for (int64_t j = 0; j < rows; ++j) {
    S* row = bank + j * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      row[d] = static_cast<S>(scale[d] * static_cast<C>(row[d]) + shift[d]);
      const C r = static_cast<C>(row[d]);
      sum[d] += static_cast<double>(r);
      sum_squares[d] += static_cast<double>(r) * static_cast<double>(r);
    }
  }
}
