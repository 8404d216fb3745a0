// memory_loss as two library products per chunk of the bank: for many anchors, for float64, for 16-bit banks and for
// D > 1024.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null; rows [0, count) count
//   out    loss [1], grad_z [B, D], pairs [2]
//   math   as sweep.cu, a chunk of the bank at a time: rows r_j, similarities s = z r^T, weights, grad += weights r
//          (the products are torch's: ../gpu.h, ../backend.cpp)
//   grid   rows_kernel: a warp to a bank row;  rescale_kernel: a block to an anchor;  those of scores.cu
//   keeps  one chunk of rows [chunk, D] and similarities [slots * B, chunk], small enough for a second-level cache, and
//          the gradient [slots * B, D]. A small B x M may be one chunk; of a large one it is 24 MB, or 256 rows.
//   needs  all M rows are processed whatever the count, since the number of products is decided before the count is
//          known; rows beyond it count for nothing
//   order  chunks one after the other; a block adds to the sums of its anchors alone: the same bits every run, as far
//          as the library's products are
#include "composite.cuh"

#include "score_block.cuh"
#include "scores.cuh"
#include "triplets.cuh"

namespace xbn::cuda {
namespace {

template <typename T>
struct CompositeWorkspace {
  T* map;      // [2, D] scale and shift in T
  T* rescale;  // [kSlots, B] of the gradient so far, as exponents have grown
  T* rows;     // [chunk, D]
  T* s;        // [slots * B, chunk] similarities, then weights
  PartialLoss<T> partial;
  Thresholds<T> thresholds;
  int64_t bytes;

  CompositeWorkspace(void* memory, int64_t B, int64_t D, int64_t slots, const Chunks& chunks, bool need_grad) {
    Carver carve(memory);
    map = carve.take<T>(2 * D);
    rescale = carve.take<T>(kSlots * B);
    rows = carve.take<T>(chunks.rows * D);
    s = carve.take<T>(slots * B * chunks.rows);
    partial = PartialLoss<T>::carve(carve, 1, slots, B);
    if (need_grad) partial.grad = carve.take<T>(slots * B * D);
    thresholds = Thresholds<T>::carve(carve, B, chunks.thresholds);
    bytes = carve.bytes();
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kBlockThreads)
    rows_kernel(const MemoryLossParams<T, S> p, const CompositeWorkspace<T> w, int64_t first, int64_t chunk, T* rows) {
  const int64_t j = blockIdx.x * kBlockWarps + threadIdx.x / kWarp;
  if (j >= chunk) return;
  const bool exists = first + j < stored_rows(p.count, p.M);
  const S* __restrict__ u = p.bank + (first + j) * p.D;
  T* __restrict__ out = rows + j * p.D;
  const auto row = [&](int64_t d) { return exists ? w.map[d] * as<T>(u[d]) + w.map[p.D + d] : T(0); };
  T inverse = 1;
  if (p.renormalize) {
    T square = 0;
#pragma unroll 4
    for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) square += row(d) * row(d);
    for (int step = 1; step < kWarp; step *= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    const T norm = std::sqrt(square), eps = static_cast<T>(p.eps);
    inverse = inverse_length(norm, eps);
  }
#pragma unroll 4
  for (int64_t d = threadIdx.x % kWarp; d < p.D; d += kWarp) out[d] = row(d) * inverse;  // again: it is in cache
}

// grad [B, D] of a slot of exponents *= rescale, where they have grown.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads) rescale_kernel(const T* rescale, int64_t D, T* grad) {
  const T factor = rescale[blockIdx.x];
  if (factor == T(1)) return;
  for (int64_t d = threadIdx.x; d < D; d += kBlockThreads) grad[blockIdx.x * D + d] *= factor;
}

}  // namespace

Chunks plan_chunks(int64_t B, int64_t M, int64_t D, int64_t bytes, const LossSpec& loss) {
  constexpr int64_t kCacheBytes = 24 << 20;  // half of an H100's second-level cache
  constexpr int64_t kMinChunk = 256;
  const int64_t fitting = kCacheBytes / bytes / larger(1, slots_of(loss) * B + D);
  const int64_t chunks = larger(1, ceil_div(M, larger(kMinChunk, fitting)));
  Chunks plan = {larger(1, round_up(ceil_div(M, chunks), 64)), 0, 1};
  if (!goes_in_rounds(loss)) return plan;
  constexpr int64_t kThresholdBytes = 64 << 20;
  constexpr int64_t kMinThresholds = 256;
  const int64_t held = kThresholdBytes / (bytes + static_cast<int64_t>(sizeof(unsigned))) / larger(1, B);
  plan.thresholds = larger(1, smaller(M, larger(kMinThresholds, held)));
  plan.rounds = larger(1, ceil_div(M, plan.thresholds));
  return plan;
}

namespace {

template <typename T>
int clear_gradient(const MemoryLossParams<T, T>& p, const CompositeWorkspace<T>& w, const Gpu& gpu) {
  if (w.partial.grad == nullptr) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(w.partial.slots * p.B * p.D) * sizeof(T);
  return cudaMemsetAsync(w.partial.grad, 0, bytes, static_cast<cudaStream_t>(gpu.stream));
}

template <typename T>
int begin_pass(const MemoryLossParams<T, T>& p, const Pass& pass, const Given& given, int64_t round,
               const Chunks& chunks, const CompositeWorkspace<T>& w, const Gpu& gpu) {
  const int error = round == 0 ? launch_begin<T>(p, pass, given, w.partial, w.map, gpu) : cudaSuccess;
  if (pass.slot[1].formula != Formula::threshold || p.B == 0 || error != cudaSuccess) return error;
  return launch_triplets_begin(p, round, chunks.rounds, w.thresholds, gpu);
}

// Similarities of a chunk become weights, and what they say of each anchor is added to its sums.
template <typename T>
int weigh_chunk(const MemoryLossParams<T, T>& p, const Pass& pass, int64_t first, const Chunks& chunks,
                const CompositeWorkspace<T>& w, const Gpu& gpu) {
  if (chunks.thresholds > 0)
    return launch_triplets_score(p, pass, w.partial, w.thresholds, first, chunks.rows, w.s, gpu);
  ChunkScores<T> chunk = {w.s, first, chunks.rows, chunks.rows, w.rescale};
  int error = launch_scores<T>(p, pass, w.partial, chunk, gpu);
  for (int k = 0; k < kSlots && error == cudaSuccess; ++k)
    if (pass.weighs(k) && is_exponential(pass.slot[k].formula) && w.partial.grad != nullptr && first > 0)
      error = run(rescale_kernel<T>, dim3(static_cast<unsigned>(p.B)), kBlockThreads, gpu, w.rescale + k * p.B, p.D,
                  w.partial.grad + k * p.B * p.D);
  return error;
}

// A pass over the bank, up to the sums and the gradient that it leaves.
template <typename T, typename S>
int run_pass(const MemoryLossParams<T, S>& p, const Pass& pass, const Given& given, int64_t round, const Chunks& chunks,
             const CompositeWorkspace<T>& w, const Gpu& gpu) {
  const int64_t B = p.B, D = p.D, n = chunks.rows;
  const int64_t slot = !pass.weighs(0), slots = pass.weighs(0) + pass.weighs(1);  // of the gradient
  T* const grad = w.partial.grad;
  const MemoryLossParams<T, T> batch = without_bank(p);
  int error = begin_pass(batch, pass, given, round, chunks, w, gpu);
  for (int64_t first = 0; first < p.M && B > 0 && error == cudaSuccess; first += n) {
    const dim3 grid(static_cast<unsigned>(ceil_div(n, kBlockWarps)));
    error = run(rows_kernel<T, S>, grid, kBlockThreads, gpu, p, w, first, n, w.rows);
    if (error != cudaSuccess) break;
    gpu.multiply_transposed(p.z, w.rows, B, n, D, w.s);
    error = weigh_chunk(batch, pass, first, chunks, w, gpu);
    if (grad != nullptr && slots > 0 && error == cudaSuccess)
      gpu.add_product(w.s + slot * B * n, w.rows, slots * B, n, D, grad + slot * B * D);
  }
  return error;
}

template <typename T, typename S>
int end_pass(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Program& program, int k, bool last_round,
             const Chunks& chunks, const CompositeWorkspace<T>& w, const Gpu& gpu) {
  if (chunks.thresholds > 0 && p.B > 0) {
    const int error = launch_triplets_end(without_bank(p), program.pass[k], w.partial, w.thresholds, gpu);
    const bool settles = last_round && k + 1 == program.passes;
    if (error != cudaSuccess || !settles) return error;
  }
  return launch_settle(p, loss, program, k, w.partial, gpu);
}

}  // namespace

template <typename T, typename S>
int composite(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu) {
  const bool need_grad = p.grad_z != nullptr && sums_gradients(loss);
  const auto w = make_workspace<CompositeWorkspace<T>>(gpu, p.B, p.D, slots_of(loss), chunks, need_grad);
  const Program program = make_program(loss, p.grad_z != nullptr);
  int error = clear_gradient(without_bank(p), w, gpu);
  for (int64_t round = 0; round < chunks.rounds && error == cudaSuccess; ++round)
    for (int k = 0; k < program.passes && error == cudaSuccess; ++k) {
      error = run_pass(p, program.pass[k], {k == 0, nullptr}, round, chunks, w, gpu);
      if (error == cudaSuccess) error = end_pass(p, loss, program, k, round + 1 == chunks.rounds, chunks, w, gpu);
    }
  return error;
}

template <typename T, typename S>
int composite_pass(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu,
                   PartialLoss<T>* partial) {
  const Pass pass = make_program(loss).pass[p.number];
  const bool need_grad = p.grad_z != nullptr && sums_gradients(loss) && pass.weighs();
  const auto w = make_workspace<CompositeWorkspace<T>>(gpu, p.B, p.D, slots_of(loss), chunks, need_grad);
  *partial = w.partial;
  const int error = clear_gradient(without_bank(p), w, gpu);
  return error != cudaSuccess ? error : run_pass(p, pass, {true, p.given}, 0, chunks, w, gpu);
}

#define XBN_OF(T, S)                                                                                     \
  template int composite(const MemoryLossParams<T, S>&, const LossSpec&, const Chunks&, const Gpu&);     \
  template int composite_pass(const MemorySumsParams<T, S>&, const LossSpec&, const Chunks&, const Gpu&, \
                              PartialLoss<T>*);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn::cuda
