// memory_sums and settle_sums: one pass of the loss against a bank that is a part of a longer one, and what the sums of
// all parts come to.
//
//   in     memory_sums: as memory_loss, the number of the pass and given [B];  settle_sums: parts [n, slots, B]
//   out    sums [slots, B], grad_z [slots, B, D];  given [B], scale [n, slots, B], totals [7]
//   math   as composite.cu: sums and gradients of one pass, those of an extreme being its row, divided by max(|r|, eps)
//          if renormalize;  losses.h: given_for, finish; sums.h: sum_of_parts, scale_of_part
//   grid   after those of composite.cu, sums_kernel: a warp to a slot of an anchor.  settle_sums_kernel: a thread to an
//          anchor;  totals_kernel: one block
//   keeps  the workspace of composite.cu;  results [B], parts of the sum in common [B]
//   needs  any GPU; float and double, banks of any dtype
//   order  as composite.cu; parts one after the other, anchors as the block's threads take them: the same bits every run
#include "composite.cuh"

namespace xbn::cuda {
namespace {

constexpr int kSumsThreads = 256;
constexpr int kSettleThreads = 64;  // few: anchors are not many either
constexpr int kTotalsThreads = 256;

template <typename T, typename S>
__global__ void __launch_bounds__(kSumsThreads)
    sums_kernel(const MemorySumsParams<T, S> p, const Pass pass, bool gathers, const PartialLoss<T> partial) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kSumsThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (unit >= kSlots * p.B) return;
  static_assert(kSlots == 2);
  const bool second = unit >= p.B;
  const Pairs pairs = second ? pass.slot[1].pairs : pass.slot[0].pairs;
  const Formula formula = second ? pass.slot[1].formula : pass.slot[0].formula;
  const bool fills = pairs != Pairs::none && (partial.state[second ? unit - p.B : unit] & kRanks);
  RowSums sums = {};
  if (fills) sums = partial.sums[unit];
  const bool has_row = fills && formula == Formula::extreme && sums.value >= 0;
  const int64_t row = has_row ? static_cast<int64_t>(sums.value) : -1;
  if (lane == 0) {
    if (has_row) sums.value += static_cast<double>(p.first);
    p.sums[unit] = sums;
  }
  if (p.grad_z == nullptr) return;
  T* const out = p.grad_z + unit * p.D;
  if (gathers && has_row) {
    const T inverse = T(1) / row_length(p, row);
    for (int64_t d = lane; d < p.D; d += kWarp) out[d] = inverse * row_value(p, row, d);
  } else {
    const T* const grad = fills && partial.grad != nullptr ? partial.grad + unit * p.D : nullptr;
#pragma unroll 4
    for (int64_t d = lane; d < p.D; d += kWarp) out[d] = grad != nullptr ? grad[d] : T(0);
  }
}

struct SettleWorkspace {
  RowResult* results;  // [B]
  RowSums* common;     // [B] what each adds to the sum in common
  int64_t bytes;

  SettleWorkspace(void* memory, int64_t B) {
    Carver carve(memory);
    results = carve.take<RowResult>(B);
    common = carve.take<RowSums>(B);
    bytes = carve.bytes();
  }
};

__global__ void __launch_bounds__(kSettleThreads)
    settle_sums_kernel(const SettleSumsParams p, const LossSpec loss, const Filled filled, bool done,
                       const SettleWorkspace w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSettleThreads + threadIdx.x;
  if (i >= p.B) return;
  const bool counts = is_marked(p.anchors, i);
  RowSums sums[kSlots] = {};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (counts && filled.some[slot])
      sums[slot] = sum_of_parts(filled.formula[slot], p.parts + slot * p.B + i, p.n, kSlots * p.B);
  w.common[i] = part_in_common(sums);
  p.given[i] = counts && !done ? given_for(loss, p.passes, sums, 0) : 0.0;
  const bool settles = counts && done;
  const RowResult result = settles ? finish(loss, sums) : RowResult{};
  w.results[i] = result;
#pragma unroll 1
  for (int64_t k = 0; k < p.n; ++k)
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t at = (k * kSlots + slot) * p.B + i;
      p.scale[at] = settles && filled.some[slot]
                        ? scale_of_part(filled.formula[slot], result.factor[slot], p.parts[at], sums[slot])
                        : 0.0;
    }
}

__global__ void __launch_bounds__(kTotalsThreads)
    totals_kernel(const SettleSumsParams p, const LossSpec loss, bool done, const SettleWorkspace w) {
  const LossSum all =
      sum_of_anchors<kTotalsThreads>(w.results, p.B, [&](int64_t i) { return done && is_marked(p.anchors, i); });
  if (threadIdx.x == 0) all.store(p.totals);
  if (done || !gives_in_common(loss)) return;
  const RowSums common = sum_in_common<kTotalsThreads>(w.common, p.B);
  if (threadIdx.x == 0) store_in_common(common, p.totals);
  for (int64_t i = threadIdx.x; i < p.B; i += kTotalsThreads)
    p.given[i] = is_marked(p.anchors, i) ? mean_in_common(common) : 0.0;
}

}  // namespace

template <typename T, typename S>
int composite_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu) {
  PartialLoss<T> partial;
  const int error = composite_pass(p, loss, chunks, gpu, &partial);
  if (error != cudaSuccess || p.B == 0) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(kSlots * p.B, kSumsThreads / kWarp)));
  return run(sums_kernel<T, S>, grid, kSumsThreads, gpu, p, make_program(loss).pass[p.number], !sums_gradients(loss),
             partial);
}

int settle_sums(const SettleSumsParams& p, const LossSpec& loss, const Gpu& gpu) {
  const auto w = make_workspace<SettleWorkspace>(gpu, p.B);
  const Program program = make_program(loss);
  const bool done = p.passes == program.passes;
  if (p.B > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.B, kSettleThreads)));
    const int error =
        run(settle_sums_kernel, grid, kSettleThreads, gpu, p, loss, Filled::after(program, p.passes), done, w);
    if (error != cudaSuccess) return error;
  }
  return run(totals_kernel, dim3(1), kTotalsThreads, gpu, p, loss, done, w);
}

#define XBN_OF(T, S) \
  template int composite_sums(const MemorySumsParams<T, S>&, const LossSpec&, const Chunks&, const Gpu&);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn::cuda
