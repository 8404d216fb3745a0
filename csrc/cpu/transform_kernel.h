// Compiled once per instruction set: see for_each_isa.h.

template <typename S>
void transform_rows(S* __restrict__ bank, int64_t rows, int64_t D, const S* __restrict__ scale,
                    const S* __restrict__ shift, double* __restrict__ sum, double* __restrict__ sum_squares) {
  for (int64_t j = 0; j < rows; ++j) {
    S* row = bank + j * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      const S r = scale[d] * row[d] + shift[d];
      row[d] = r;
      sum[d] += static_cast<double>(r);
      sum_squares[d] += static_cast<double>(r) * static_cast<double>(r);
    }
  }
}
