// step_pairs, step_total: what a step computes besides its ops, before and after its losses; a launch each, and two more
// where the gradient is centred.
//
//   in     mask, ids, slots [B], step, count;  losses, weights, derivatives [B, D], z [B, D], norm [B]
//   out    anchors, exclude [B], ranked;  loss, grad [B, D], grad_rows [B, D];  step is counted
//   math   grad_z = own_weight (own_anchors + own_rows) + memory_weight grad_memory, then that of normalize; of
//          grad_memory the mean of what is across the anchors is taken off first, where that is asked for
//   grid   step_pairs: a thread to a row. along: a warp to a row. mean_gradient: a block to 32 columns, its warps take
//          turns at the rows. step_total: a block of 128 threads to a row, as normalize_backward has it
//   keeps  nothing; a thread reads again what it has written
//   needs  any GPU; float and double. 16-byte accesses where D and the addresses allow them, else one element at a time
//   order  of a row's sum fixed by D: the same bits every run
#include "normalize.cuh"

namespace xbn::cuda {
namespace {

constexpr int kMeanThreads = 256;

__global__ void __launch_bounds__(kRowThreads) step_pairs_kernel(const StepPairsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i == 0 && p.ranked != nullptr) *p.ranked = *p.step < p.warmup_steps ? 0 : *p.count;
  if (i >= p.B) return;
  if (p.anchors != nullptr) p.anchors[i] = !p.mask[i];
  if (p.exclude != nullptr) p.exclude[i] = stored_id(p.ids, i, p.slots == nullptr ? -1 : p.slots[i]);
}

template <typename T>
__global__ void __launch_bounds__(kMeanThreads) along_kernel(const StepTotalParams<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kMeanThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= p.B) return;
  double product = 0, squared = 0;
  for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) {
    const double z = static_cast<double>(p.ranking[i * p.D + d]);
    product += static_cast<double>(p.grad_memory[i * p.D + d]) * z;
    squared += z * z;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    product += shuffle_xor(product, step), squared += shuffle_xor(squared, step);
  if (threadIdx.x % kWarp == 0) p.along[i] = part_along(product, squared);
}

template <typename T>
__global__ void __launch_bounds__(kMeanThreads) mean_gradient_kernel(const StepTotalParams<T> p) {
  constexpr int kWarps = kMeanThreads / kWarp;
  __shared__ double sums[kWarps][kWarp];
  __shared__ int64_t counts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = warp; i < p.B; i += kWarps) {
    if (!is_marked(p.anchors, i) || std::isnan(p.along[i])) continue;  // or one that is not finite spoils all
    ++count;
    if (d < p.D)
      sum += static_cast<double>(p.grad_memory[i * p.D + d]) - p.along[i] * static_cast<double>(p.ranking[i * p.D + d]);
  }
  sums[warp][lane] = sum;
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  if (warp != 0 || d >= p.D) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += sums[w][lane];
    count += counts[w];
  }
  p.mean_gradient[d] = sum / static_cast<double>(larger(1, count));
}

// sum + weight * a, in columns [d, d + kWidth) of row i; a may be null.
template <int kWidth, typename T>
__device__ void add_weighted(double weight, const T* a, int64_t at, double (&sum)[kWidth]) {
  if (a == nullptr) return;
  const auto columns = *reinterpret_cast<const Vector<T, kWidth>*>(a + at);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) sum[c] += weight * static_cast<double>(columns.value[c]);
}

template <int kWidth, typename T>
__device__ void write(const double (&sum)[kWidth], T* out) {
  Vector<T, kWidth> columns;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) columns.value[c] = static_cast<T>(sum[c]);
  *reinterpret_cast<Vector<T, kWidth>*>(out) = columns;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRowThreads) step_total_kernel(const StepTotalParams<T> p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    double loss = 0;
    if (p.own_loss != nullptr) loss += p.own_weight * static_cast<double>(*p.own_loss);
    if (p.memory_loss != nullptr) loss += p.memory_weight * static_cast<double>(*p.memory_loss);
    *p.loss = static_cast<T>(loss);
    ++*p.step;
    if (p.no_pairs != nullptr) p.no_pairs[0] = p.no_pairs[1] = static_cast<double>(NAN);
  }
  if (p.grad == nullptr || blockIdx.x >= p.B) return;
  const int64_t begin = blockIdx.x * p.D;
  const bool centers = p.mean_gradient != nullptr && is_marked(p.anchors, blockIdx.x);
  for (int64_t d = threadIdx.x * kWidth; d < p.D; d += kRowThreads * kWidth) {
    double grad[kWidth] = {}, grad_rows[kWidth] = {};
    add_weighted(p.memory_weight, p.grad_memory, begin + d, grad);
    if (centers)
      for (int c = 0; c < kWidth; ++c) grad[c] -= p.memory_weight * p.mean_gradient[d + c];
    add_weighted(p.own_weight, p.own_anchors, begin + d, grad);
    if (p.grad_rows == nullptr) {
      add_weighted(p.own_weight, p.own_rows, begin + d, grad);
    } else {
      add_weighted(p.own_weight, p.own_rows, begin + d, grad_rows);
      write(grad_rows, p.grad_rows + begin + d);
    }
    write(grad, p.grad + begin + d);
  }
  if (p.norm != nullptr)
    normalize_row_backward<kWidth>(p.grad + begin, p.z + begin, p.norm[blockIdx.x], p.eps, p.D, p.grad + begin);
}

}  // namespace

int step_pairs(const StepPairsParams& p, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>(larger(1, ceil_div(p.B, kRowThreads))));
  return run(step_pairs_kernel, grid, kRowThreads, gpu, p);
}

template <typename T>
int step_total(const StepTotalParams<T>& p, const Gpu& gpu) {
  const int64_t rows = p.grad == nullptr ? 0 : p.B;
  if (p.mean_gradient != nullptr) {
    const dim3 of_rows(static_cast<unsigned>(larger(1, ceil_div(p.B, kMeanThreads / kWarp))));
    if (const int error = run(along_kernel<T>, of_rows, kMeanThreads, gpu, p)) return error;
    const dim3 of_columns(static_cast<unsigned>(ceil_div(p.D, kWarp)));
    if (const int error = run(mean_gradient_kernel<T>, of_columns, kMeanThreads, gpu, p)) return error;
  }
  const bool wide = in_vectors<T>(p.D, {p.own_anchors, p.own_rows, p.grad_memory, p.z, p.grad, p.grad_rows});
  const auto kernel = wide ? step_total_kernel<T, 16 / sizeof(T)> : step_total_kernel<T, 1>;
  return run(kernel, dim3(static_cast<unsigned>(larger(1, rows))), kRowThreads, gpu, p);
}

template int step_total(const StepTotalParams<float>&, const Gpu&);
template int step_total(const StepTotalParams<double>&, const Gpu&);

}  // namespace xbn::cuda
