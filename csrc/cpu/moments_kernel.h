// Compiled once per instruction set: see for_each_isa.h.

// 0 * x is 0 for every finite x and NaN for the others, and a NaN stays in the sum.
template <typename T>
void row_is_finite(const T* x, int64_t D, bool* finite) {
  T zero = 0;
#pragma omp simd reduction(+ : zero)
  for (int64_t d = 0; d < D; ++d) zero += T(0) * x[d];
  *finite = zero == T(0);
}

template <typename T>
void moments_stripe(const MomentsParams<T>& p, const int64_t* rows, int64_t n, int64_t begin, int64_t end) {
  double sum[kStripe] = {}, sum_squares[kStripe] = {};
  const int64_t width = end - begin;
  const T* pivot = p.x + rows[0] * p.D + begin;
  for (int64_t i = 0; i < n; ++i) {
    const T* x = p.x + rows[i] * p.D + begin;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      const double v = static_cast<double>(x[d]) - static_cast<double>(pivot[d]);
      sum[d] += v;
      sum_squares[d] += v * v;
    }
  }
  for (int64_t d = 0; d < width; ++d) {
    const Moments shifted = moments_from_sums(sum[d], sum_squares[d], static_cast<double>(n));
    p.mean[begin + d] = static_cast<double>(pivot[d]) + shifted.mean;
    p.std[begin + d] = shifted.std;
  }
}
