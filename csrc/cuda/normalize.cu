// normalize, normalize_backward: the rows of a batch divided by their norms, and the derivative of that; a launch each.
//
//   in     x [B, D];  backward: grad_z [B, D], z [B, D], norm [B]
//   out    z [B, D], norm [B] in double;  backward: grad_x [B, D]
//   math   z = x / max(norm, eps);  grad_x = (grad_z - z (z . grad_z)) / norm, or grad_z / eps of a row below eps.
//          Computed in double: the squares of a finite float neither overflow nor vanish. A row with a NaN is NaN, one
//          with an Inf has NaN in its place and 0 elsewhere, the gradient of both is NaN, as PyTorch has it
//   grid   a block of 128 threads to a row, a thread to every 128th 16-byte vector of columns: one at D = 512 in float,
//          so that a row takes the time of a single access
//   keeps  nothing; the second look at a row finds it in the first-level cache
//   needs  any GPU; float and double. 16-byte accesses where D and the addresses allow them, else one element at a time
//   order  of a row's sum fixed by D: the same bits every run
#include "normalize.cuh"

namespace xbn::cuda {
namespace {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) normalize_kernel(const NormalizeParams<T> p) {
  using Columns = Vector<T, kWidth>;
  const int64_t begin = blockIdx.x * p.D;
  const double norm = std::sqrt(row_product<kWidth>(p.x + begin, p.x + begin, p.D));
  const double factor = inverse_length(norm, p.eps);
  if (threadIdx.x == 0) p.norm[blockIdx.x] = norm;
  for (int64_t d = threadIdx.x * kWidth; d < p.D; d += kRowThreads * kWidth) {
    Columns z = *reinterpret_cast<const Columns*>(p.x + begin + d);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) z.value[c] = static_cast<T>(factor * static_cast<double>(z.value[c]));
    *reinterpret_cast<Columns*>(p.z + begin + d) = z;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) normalize_backward_kernel(const NormalizeBackwardParams<T> p) {
  const int64_t begin = blockIdx.x * p.D;
  normalize_row_backward<kWidth>(p.grad_z + begin, p.z + begin, p.norm[blockIdx.x], p.eps, p.D, p.grad_x + begin);
}

}  // namespace

template <typename T>
int normalize(const NormalizeParams<T>& p, const Gpu& gpu) {
  if (p.B == 0) return cudaSuccess;
  const bool wide = in_vectors<T>(p.D, {p.x, p.z});
  const auto kernel = wide ? normalize_kernel<T, 16 / sizeof(T)> : normalize_kernel<T, 1>;
  return run(kernel, dim3(static_cast<unsigned>(p.B)), kRowThreads, gpu, p);
}

template <typename T>
int normalize_backward(const NormalizeBackwardParams<T>& p, const Gpu& gpu) {
  if (p.B == 0) return cudaSuccess;
  const bool wide = in_vectors<T>(p.D, {p.grad_z, p.z, p.grad_x});
  const auto kernel = wide ? normalize_backward_kernel<T, 16 / sizeof(T)> : normalize_backward_kernel<T, 1>;
  return run(kernel, dim3(static_cast<unsigned>(p.B)), kRowThreads, gpu, p);
}

template int normalize(const NormalizeParams<float>&, const Gpu&);
template int normalize(const NormalizeParams<double>&, const Gpu&);
template int normalize_backward(const NormalizeBackwardParams<float>&, const Gpu&);
template int normalize_backward(const NormalizeBackwardParams<double>&, const Gpu&);

}  // namespace xbn::cuda
