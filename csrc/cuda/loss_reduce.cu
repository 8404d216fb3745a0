// The end of memory_loss: partial sums of all splits of the bank become the loss and its gradient.
//
//   in     sums [splits, kinds, B], grad [splits, kinds, B, D], state [B]
//   out    loss [1], grad_z [B, D]
//   math   factor_k = 1 / (number of anchors, or of active pairs of the kind);  loss = sum_k factor_k value_k
//          grad_z_i = sum_k factor_k sum_split grad;  0 for a row that is no anchor, NaN for one that is not finite, so
//          that whoever looks at gradients only, as a gradient scaler does, sees it
//   grid   factor_kernel: one block, up to a warp to an anchor; gradient_kernel: up to 8 threads to an element
//   order  fixed by the shapes: the same bits every run
#include "loss_partial.cuh"

namespace xbn::cuda {
namespace {

constexpr int kFactorThreads = 1024;
constexpr int kGradientThreads = 256;
constexpr int kMaxLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kFactorThreads)
    factor_kernel(const PartialLoss<T> partial, int64_t B, bool mean, int width, T* loss) {
  const int lane = threadIdx.x % width, group = threadIdx.x / width, groups = kFactorThreads / width;
  double value[2] = {}, active[2] = {}, rows = 0;
  for (int64_t i = group; i < B; i += groups) {
    if (!(partial.state[i] & kRanks)) continue;
    if (lane == 0) rows += 1;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind)  // known, so that the sums stay in registers
      for (int64_t split = kind < partial.kinds ? lane : partial.splits; split < partial.splits; split += width) {
        const RowSums sums = partial.sums[(split * partial.kinds + kind) * B + i];
        value[kind] += sums.value;
        active[kind] += sums.active;
      }
  }
  rows = block_sum<kFactorThreads>(rows);
  double total = 0;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    if (kind >= partial.kinds) break;
    const double value_of_all = block_sum<kFactorThreads>(value[kind]),
                 active_of_all = block_sum<kFactorThreads>(active[kind]);
    const double factor = reduction_factor(mean, rows, active_of_all);
    total += factor * value_of_all;
    if (threadIdx.x == 0) partial.factor[kind] = static_cast<T>(factor);
  }
  if (threadIdx.x == 0) *loss = static_cast<T>(total);
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    gradient_kernel(const PartialLoss<T> partial, int64_t B, int64_t D, int lanes, T* grad_z) {
  __shared__ T sums[kGradientThreads];
  const int elements = kGradientThreads / lanes, lane = threadIdx.x / elements;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * elements + threadIdx.x % elements;  // element of grad_z
  const uint8_t state = k < B * D ? partial.state[k / D] : 0;
  T sum = 0;
  if ((state & kRanks) && (state & kFinite)) {
    for (int64_t kind = 0; kind < partial.kinds; ++kind) {
      T of_kind = 0;
#pragma unroll 4
      for (int64_t split = lane; split < partial.splits; split += lanes)
        of_kind += partial.grad[(split * partial.kinds + kind) * B * D + k];
      sum += partial.factor[kind] * of_kind;
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || k >= B * D) return;
  for (int other = 1; other < lanes; ++other) sum += sums[other * elements + threadIdx.x];
  grad_z[k] = (state & kFinite) ? sum : static_cast<T>(NAN);
}

int power_of_two_up_to(int64_t n, int most) {
  int power = 1;
  while (power * 2 <= most && power * 2 <= n) power *= 2;
  return power;
}

}  // namespace

template <typename T, typename S>
int launch_reduce(const MemoryLossParams<T, S>& p, const PartialLoss<T>& partial, const Launch& launch) {
  const int width = power_of_two_up_to(partial.splits, kWarp);
  const int error = run(factor_kernel<T>, dim3(1), kFactorThreads, launch, partial, p.B, p.mean, width, p.loss);
  if (error != cudaSuccess || p.grad_z == nullptr || p.B == 0) return error;
  const int lanes = power_of_two_up_to(partial.splits, kMaxLanes);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.B * p.D, kGradientThreads / lanes)));
  return run(gradient_kernel<T>, grid, kGradientThreads, launch, partial, p.B, p.D, lanes, p.grad_z);
}

#define XBN_INSTANTIATE(T, S) \
  template int launch_reduce(const MemoryLossParams<T, S>&, const PartialLoss<T>&, const Launch&);
XBN_INSTANTIATE(float, float)
XBN_INSTANTIATE(float, double)
XBN_INSTANTIATE(double, float)
XBN_INSTANTIATE(double, double)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
