// Compiled once per instruction set: see for_each_isa.h.

// As many accumulators as products_kernel.h has, which is enough to hide the latency of a multiply-add. In two
// dimensions, as there: a single loop over so many is not unrolled, and they would live in memory.
template <typename T>
void multiply_add(int64_t rounds, T factor, T term, Peak* peak) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int R = 6, C = kVectorRegisters / 8;
  Vector x[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) x[r][c] = Vector{} + T(1);
  for (int64_t round = 0; round < rounds; ++round)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) x[r][c] = x[r][c] * factor + term;
  Vector sum = {};
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum += x[r][c];
  constexpr double kChains = kLanes * R * C;
  peak->flops = 2 * kChains * static_cast<double>(rounds);
  peak->result = 0;
  for (int lane = 0; lane < kLanes; ++lane) peak->result += static_cast<double>(sum[lane]) / kChains;
}
