// Between the passes of memory_loss, and its end: the partial sums of all splits of the bank become what each anchor is
// given for the next pass, or the loss and its gradient.
//
//   in     sums [splits, slots, B], grad [splits, slots, B, D], state [B]; the device knows how many splits are filled
//   out    given [B]; or loss [1], grad_z [B, D], pairs [2]
//   math   sums.h: add; losses.h: given_for, finish;  loss = sum over groups of average * sum of the anchors' values,
//          average being 1 / sum of their counts;  grad_z_i = sum_slot average factor_i
//          sum_split e^(shift_split - shift) grad.  Losses of extremes gather the two rows instead. 0 for a row that is
//          no anchor, NaN for one that is not finite, so that a gradient scaler, which looks at gradients only, sees it
//   grid   settle_kernel: up to a warp to an anchor; the block that finishes last adds up the anchors, after the last pass
//          and where they are given a mean over all. gradient_kernel:
//          a block to an anchor and 64 or more columns, up to 16 threads to the splits of one, each with four loads on
//          their way; gather_kernel: a warp to an anchor
//   keeps  of each anchor its totals, result and factors in the workspace: anchor.cuh
//   needs  any GPU; float and double, banks of any dtype; gradients 16 bytes at a time where D and the addresses allow
//          it
//   order  fixed by the shapes: the same bits every run
#include <utility>

#include "anchor.cuh"

namespace xbn::cuda {
namespace {

constexpr int kSettleThreads = 256;
constexpr int kGradientThreads = 256;
constexpr int kMaxLanes = 16;  // threads to the splits of an element
constexpr int kInFlight = 4;   // splits that a thread reads before it adds up the first

int power_of_two_up_to(int64_t n, int most) {
  int power = 1;
  while (power * 2 <= most && power * 2 <= n) power *= 2;
  return power;
}

// The formula of all slots of a kind of loss, in whatever pass, where they have the same.
struct OneFormula {
  bool same;
  Formula formula;
};
constexpr OneFormula one_formula_of(LossKind kind) {
  const Program program = make_program({.kind = kind, .a = 1, .b = 1, .mining = 0});  // the longest
  OneFormula one = {};
  bool is_first = true;
  for (int pass = 0; pass < program.passes; ++pass)
    for (const Slot& slot : program.pass[pass].slot) {
      if (slot.pairs == Pairs::none) continue;
      one = {is_first || (one.same && slot.formula == one.formula), slot.formula};
      is_first = false;
    }
  return one;
}
template <LossKind kKind>
constexpr OneFormula kOneFormula = one_formula_of(kKind);

// The formula of a slot: if one is that of all, known when this is compiled. (That of a Euclidean distance is settled as
// a margin's is.)
template <LossKind kKind>
__device__ __forceinline__ Formula formula_of(const Filled& filled, int slot) {
  return kOneFormula<kKind>.same ? kOneFormula<kKind>.formula : filled.formula[slot];
}

// Sums over the lanes of a group of `width` threads of a warp, in a fixed tree; in all of them.
__device__ __forceinline__ RowSums group_add(Formula formula, RowSums sums, int width) {
  for (int step = 1; step < width; step *= 2) sums = add(formula, sums, shuffle_xor(sums, step));
  return sums;
}

// The sums over all anchors, in order: by the last block.
template <typename T>
__device__ void finish_all(const PartialLoss<T>& partial, int64_t B, T* value_of_all, double* pairs) {
  const LossSum sum =
      sum_of_anchors<kSettleThreads>(partial.result, B, [&](int64_t i) { return partial.state[i] & kRanks; });
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) partial.average[k] = static_cast<T>(sum.average(k));
  *value_of_all = static_cast<T>(sum.loss());
  sum.store_pairs(pairs);
}

// One for each kind of loss: of so short a kernel, most of the time goes to fetching its instructions.
template <typename T, LossKind kKind>
__global__ void __launch_bounds__(kSettleThreads, 2)
    settle_kernel(const PartialLoss<T> partial, LossSpec loss, const Filled filled, int next, int64_t B, int width,
                  T* value_of_all, double* pairs) {
  __shared__ bool last;
  loss.kind = kKind;
  const int lane = threadIdx.x % width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kSettleThreads / width) + threadIdx.x / width;
  const bool ranks = i < B && (partial.state[i] & kRanks);
  const int splits = static_cast<int>(partial.filled()), slots = static_cast<int>(partial.slots);
  const auto at = [&](int split, int slot) { return static_cast<int64_t>(split * slots + slot) * B + i; };

  RowSums total[kSlots] = {};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (filled.some[slot]) total[slot] = no_sums(formula_of<kKind>(filled, slot));
#pragma unroll 1
  for (int first = ranks ? lane : splits; first < splits; first += kInFlight * width) {
    RowSums sums[kSlots][kInFlight];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
      for (int q = 0; q < kInFlight; ++q)
        if (filled.some[slot] && first + q * width < splits) sums[slot][q] = partial.sums[at(first + q * width, slot)];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
      for (int q = 0; q < kInFlight; ++q)
        if (filled.some[slot] && first + q * width < splits)
          total[slot] = add(formula_of<kKind>(filled, slot), total[slot], sums[slot][q]);
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (filled.some[slot]) total[slot] = group_add(formula_of<kKind>(filled, slot), total[slot], width);

  if (next != 0) {
    if constexpr (!gives_in_common({.kind = kKind})) {
      if (ranks && lane == 0) partial.given[i] = static_cast<T>(given_for(loss, next, total, 0));
    } else {
      if (i < B && lane == 0) partial.total[i] = ranks ? part_in_common(total) : no_sums(Formula::exponent);
      if (!is_last_block(partial.ticket, gridDim.x, &last)) return;
      const T common = static_cast<T>(mean_in_common(sum_in_common<kSettleThreads>(partial.total, B)));
      for (int64_t k = threadIdx.x; k < B; k += kSettleThreads) partial.given[k] = common;
    }
    return;
  }
  const RowResult result = ranks ? finish(loss, total) : RowResult{};
  if (i < B && lane == 0) partial.result[i] = result;
  if (ranks) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot >= slots) break;
      if (lane == 0) partial.total[slot * B + i] = total[slot];
      const bool scaled = is_exponential(formula_of<kKind>(filled, slot));
#pragma unroll 1
      for (int first = lane; first < splits; first += kInFlight * width) {
        double shift[kInFlight];
#pragma unroll
        for (int q = 0; q < kInFlight; ++q)
          if (first + q * width < splits) shift[q] = partial.sums[at(first + q * width, slot)].shift;
#pragma unroll
        for (int q = 0; q < kInFlight; ++q)
          if (first + q * width < splits)
            partial.scale[at(first + q * width, slot)] = static_cast<T>(
                scaled ? result.factor[slot] * rescale(shift[q], total[slot].shift) : result.factor[slot]);
      }
    }
  }
  if (!is_last_block(partial.ticket, gridDim.x, &last)) return;
  finish_all(partial, B, value_of_all, pairs);
}

// A block to an anchor and 2^across_bits vectors of columns, times as many lanes as there are threads, each with some
// of the splits.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kGradientThreads, sizeof(T) == 4 ? 4 : 3)
    gradient_kernel(const PartialLoss<T> partial, const LossSpec loss, int64_t B, int64_t D, int across_bits,
                    T* grad_z) {
  using Row = Vector<T, kWidth>;
  __shared__ Row of_lanes[kGradientThreads];
  const int across = 1 << across_bits, column = threadIdx.x & (across - 1);
  const int lane = threadIdx.x >> across_bits, lanes = blockDim.x >> across_bits;
  const int64_t i = blockIdx.x, d = (static_cast<int64_t>(blockIdx.y) * across + column) * kWidth;
  const int splits = static_cast<int>(partial.filled()), slots = static_cast<int>(partial.slots);
  const uint8_t state = partial.state[i];
  const int64_t step = static_cast<int64_t>(lanes) * slots * B;
  Row sum = {};
  if ((state & kRanks) && (state & kFinite) && d < D) {
    for (int slot = 0; slot < slots; ++slot) {
      Row of_slot = {};
      const int64_t at = static_cast<int64_t>(lane * slots + slot) * B + i;
      const T *scales = partial.scale + at, *grads = partial.grad + at * D + d;
#pragma unroll 1
      for (int first = lane; first < splits; first += kInFlight * lanes) {
        T scale[kInFlight];
        Row grad[kInFlight];
#pragma unroll
        for (int q = 0; q < kInFlight; ++q) {
          if (first + q * lanes < splits) {
            scale[q] = *scales;
            grad[q] = *reinterpret_cast<const Row*>(grads);
          }
          scales += step;
          grads += step * D;
        }
#pragma unroll
        for (int q = 0; q < kInFlight; ++q)
          if (first + q * lanes < splits) {
#pragma unroll
            for (int c = 0; c < kWidth; ++c) of_slot.value[c] += scale[q] * grad[q].value[c];
          }
      }
      const T average = partial.average[group_of(loss, slot)];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum.value[c] += average * of_slot.value[c];
    }
  }
  of_lanes[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || d >= D) return;
#pragma unroll 4
  for (int other = 1; other < lanes; ++other) {
    const Row more = of_lanes[other * across + column];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum.value[c] += more.value[c];
  }
#pragma unroll
  for (int c = 0; c < kWidth; ++c)
    if (!(state & kFinite)) sum.value[c] = static_cast<T>(NAN);
  *reinterpret_cast<Row*>(grad_z + i * D + d) = sum;
}

template <int kWidth, typename T>
int launch_gradient(const PartialLoss<T>& partial, const LossSpec& loss, int64_t B, int64_t D, T* grad_z,
                    const Gpu& gpu) {
  const int lanes = power_of_two_up_to(partial.splits, kMaxLanes);
  int bits = 0;
  while (lanes << bits < kGradientThreads && kWidth << bits < D) ++bits;
  const dim3 grid(static_cast<unsigned>(B), static_cast<unsigned>(ceil_div(D, kWidth << bits)));
  return run(gradient_kernel<T, kWidth>, grid, lanes << bits, gpu, partial, loss, B, D, bits, grad_z);
}

template <typename T, typename S>
__global__ void __launch_bounds__(kGradientThreads, 4)
    gather_kernel(const MemoryLossParams<T, S> p, const PartialLoss<T> partial) {
  const int64_t i = blockIdx.x * (kGradientThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= p.B) return;
  const uint8_t state = partial.state[i];
  int64_t row[kSlots] = {-1, -1};
  T factor[kSlots] = {};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!(state & kRanks) || partial.result[i].factor[slot] == 0) continue;
    row[slot] = static_cast<int64_t>(partial.total[slot * p.B + i].value);
    factor[slot] = static_cast<T>(partial.result[i].factor[slot]) * partial.average[0];
    factor[slot] /= row_length(p, row[slot]);
  }
  for (int64_t d = lane; d < p.D; d += kWarp) {
    T sum = (state & kFinite) ? T(0) : static_cast<T>(NAN);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      if (row[slot] >= 0) sum += factor[slot] * row_value(p, row[slot], d);
    p.grad_z[i * p.D + d] = sum;
  }
}

constexpr int kLossKinds = [] {
  int kinds = 0;
  for (const NamedLoss& loss : kLosses) kinds = static_cast<int>(larger(kinds, static_cast<int>(loss.kind) + 1));
  return kinds;
}();

template <typename T, int... kKinds>
auto settle_kernel_of(LossKind kind, std::integer_sequence<int, kKinds...>) {
  using Kernel = decltype(&settle_kernel<T, LossKind::contrastive>);
  const Kernel kernels[] = {settle_kernel<T, static_cast<LossKind>(kKinds)>...};
  return kernels[static_cast<int>(kind)];
}

}  // namespace

template <typename T, typename S>
int launch_settle(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Program& program, int k,
                  const PartialLoss<T>& partial, const Gpu& gpu) {
  const Filled filled = Filled::after(program, k + 1);
  const bool last = k + 1 == program.passes;
  const int width = power_of_two_up_to(partial.splits, kWarp);
  const dim3 blocks(static_cast<unsigned>(larger(1, ceil_div(p.B, kSettleThreads / width))));
  const auto kernel = settle_kernel_of<T>(loss.kind, std::make_integer_sequence<int, kLossKinds>());
  const int error =
      run(kernel, blocks, kSettleThreads, gpu, partial, loss, filled, last ? 0 : k + 1, p.B, width, p.loss, p.pairs);
  if (error != cudaSuccess || !last || p.grad_z == nullptr || p.B == 0) return error;
  if (!sums_gradients(loss)) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.B, kGradientThreads / kWarp)));
    return run(gather_kernel<T, S>, grid, kGradientThreads, gpu, p, partial);
  }
  constexpr int kWidth = 16 / sizeof(T);
  const bool wide = p.D % kWidth == 0 && is_aligned<T, kWidth>(p.grad_z) && is_aligned<T, kWidth>(partial.grad);
  return wide ? launch_gradient<kWidth>(partial, loss, p.B, p.D, p.grad_z, gpu)
              : launch_gradient<1>(partial, loss, p.B, p.D, p.grad_z, gpu);
}

#define XBN_OF(T, S)                                                                              \
  template int launch_settle(const MemoryLossParams<T, S>&, const LossSpec&, const Program&, int, \
                             const PartialLoss<T>&, const Gpu&);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn::cuda
