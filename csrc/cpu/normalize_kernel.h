// Compiled once per instruction set: see for_each_isa.h.

// Four quarters of the row at a time: in one sum, every addition would wait for the last.
template <typename T>
double sum_of_products(const T* a, const T* b, int64_t D) {
  const int64_t quarter = D / 4;
  const auto product = [&](int64_t d) { return static_cast<double>(a[d]) * static_cast<double>(b[d]); };
  double first = 0, second = 0, third = 0, fourth = 0;
#pragma omp simd reduction(+ : first, second, third, fourth)
  for (int64_t d = 0; d < quarter; ++d) {
    first += product(d);
    second += product(quarter + d);
    third += product(2 * quarter + d);
    fourth += product(3 * quarter + d);
  }
  for (int64_t d = 4 * quarter; d < D; ++d) first += product(d);
  return (first + second) + (third + fourth);
}

template <typename T>
void normalize_rows(const NormalizeParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = p.x + i * p.D;
    T* z = p.z + i * p.D;
    p.norm[i] = std::sqrt(sum_of_products(x, x, p.D));
    const double factor = inverse_length(p.norm[i], p.eps);
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) z[d] = static_cast<T>(factor * static_cast<double>(x[d]));
  }
}

template <typename T>
void normalize_rows_backward(const NormalizeBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *grad_z = p.grad_z + i * p.D, *z = p.z + i * p.D;
    T* grad_x = p.grad_x + i * p.D;
    const double along = is_short(p.norm[i], p.eps) ? 0 : sum_of_products(grad_z, z, p.D);
    const double factor = inverse_length(p.norm[i], p.eps);
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d)
      grad_x[d] = static_cast<T>(factor * (static_cast<double>(grad_z[d]) - along * static_cast<double>(z[d])));
  }
}
