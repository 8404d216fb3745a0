// Compiled once per instruction set: see for_each_isa.h.

// Several rows at a time, so that the sums are read and written once for all of them.
template <int R, typename S, typename C>
void transform_some(S* __restrict__ bank, int64_t D, const C* __restrict__ scale, const C* __restrict__ shift,
                    double* __restrict__ sum, double* __restrict__ sum_squares) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) {
    double of_rows = 0, of_squares = 0;
    for (int j = 0; j < R; ++j) {
      S& u = bank[j * D + d];
      u = static_cast<S>(scale[d] * static_cast<C>(u) + shift[d]);
      const double r = static_cast<double>(static_cast<C>(u));
      of_rows += r;
      of_squares += r * r;
    }
    sum[d] += of_rows;
    sum_squares[d] += of_squares;
  }
}

template <typename S, typename C>
void transform_rows(S* bank, int64_t rows, int64_t D, const C* scale, const C* shift, double* sum,
                    double* sum_squares) {
  constexpr int R = 8;
  int64_t j = 0;
  for (; j + R <= rows; j += R) transform_some<R>(bank + j * D, D, scale, shift, sum, sum_squares);
  for (; j < rows; ++j) transform_some<1>(bank + j * D, D, scale, shift, sum, sum_squares);
}
