// Compiled once per instruction set: see for_each_isa.h.

// What is stored of row i: u [D]; and whether all of it is finite.
template <typename T, typename S>
void pull_back(const EnqueueParams<T, S>& p, int64_t i, S* u, char* finite) {
  using C = typename Compute<S>::type;
  const T* z = p.z + i * p.D;
  double zero = 0;  // stays 0 as long as every value is finite
#pragma omp simd reduction(+ : zero)
  for (int64_t d = 0; d < p.D; ++d) {
    u[d] = static_cast<S>(static_cast<C>((static_cast<double>(z[d]) - p.shift[d]) / p.scale[d]));
    zero += 0.0 * as<double>(u[d]);
  }
  *finite = zero == 0;
}

// Columns [begin, end) of the n rows of u [B, D] go into the bank, and into the sums; those of the rows that leave go
// out of them.
template <typename T, typename S>
void replace_rows(const EnqueueParams<T, S>& p, const S* u, const int64_t* rows, size_t n, int64_t filled,
                  int64_t begin, int64_t end) {
  double *sum = p.sums, *sum_squares = p.sums + p.D;
  for (size_t k = 0; k < n; ++k) {
    const S* in_row = u + rows[k] * p.D;
    const int64_t slot = p.slots[rows[k]];
    S* stored = p.bank + (slot - p.first) * p.D;
    const bool evicts = slot < filled;
#pragma omp simd
    for (int64_t d = begin; d < end; ++d) {
      const double in = as<double>(in_row[d]), out = evicts ? as<double>(stored[d]) : 0.0;
      sum[d] += in - out;
      sum_squares[d] += in * in - out * out;
      stored[d] = in_row[d];
    }
  }
}
