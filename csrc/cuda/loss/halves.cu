// memory_loss for losses in which every pair weighs, of up to some hundred anchors: as two products per chunk of the bank
// with the scores between them, and no copy of the rows. Each float is two fp16 numbers, its halves.
//
//   in     as sweep.cu; rows of z and bank are multiples of 16 bytes long, and aligned to that
//   out    as sweep.cu
//   passes each is, chunk after chunk: similarities of all pairs, similarities.cu; weights in their place and sums,
//          scores.cu; weights times rows, weighted_rows.cu. A chunk's matrix stays in the second-level cache. A later
//          pass finds the similarities there, if there is one chunk and no pass before it has left weights.
//          Where a row's norm is not within [2^-10, 255], halves have too few digits: then scores and gradient return
//          at once and the sweep runs; otherwise the sweep returns at once. The device decides, and the host does not
//          wait for it.
//   math   as sweep.cu, to the digits of float
//   grid   of the kernels, each on its own. A split is a part of every chunk
//   keeps  a chunk's similarities or weights, 32 MB, or of 256 rows; and the partial sums of a sweep, where those of
//          splits have their place, too
//   needs  compute capability 8.0, and of shared memory what similarities.cu says
//   order  the same bits every run on the same kind of GPU
#include "halves.cuh"

#include "pass.cuh"
#include "way.h"

namespace xbn::cuda {

int64_t plan_chunk(int64_t B, int64_t M, const LossSpec& loss) {
  constexpr int64_t kCacheBytes = 32 << 20;  // A100's second-level cache has 40 MB, an H100's and H200's 50
  constexpr int64_t kLeastRows = 256;
  const int64_t fitting = kCacheBytes / static_cast<int64_t>(sizeof(float)) / larger(1, slots_of(loss) * B);
  return larger(64, round_up(ceil_div(M, larger(1, ceil_div(M, larger(kLeastRows, fitting)))), 64));
}

namespace {

struct HalvesWorkspace {
  SweepGrid grid;
  Parts parts;
  ChunkScores<float> chunk;
  float* inverse;
  unsigned* closed;
  PartialLoss<float> partial;
  int64_t bytes;

  HalvesWorkspace(void* memory, int64_t B, int64_t M, int64_t D, int64_t rows, const LossSpec& loss, bool need_grad,
                  int multiprocessors) {
    const int64_t slots = slots_of(loss);
    grid = plan_sweep(B, M, D, multiprocessors);
    parts = plan_parts(B, D, rows, multiprocessors);
    const int64_t most = larger(grid.splits, parts.count);
    Carver carve(memory);
    chunk.chunk = rows, chunk.part = parts.rows;
    chunk.s = carve.take<float>(slots * B * rows);
    chunk.rescale = carve.take<float>(parts.count * kSlots * B);
    chunk.largest = carve.take<float>(parts.count * kSlots * B);
    chunk.some = carve.take<uint8_t>(kSlots * rows / 32 * chunk.row_of_some(B));
    chunk.inverse = inverse = carve.take<float>(rows);
    closed = carve.take<unsigned>(1);
    partial = PartialLoss<float>::carve(carve, most, slots, B);
    if (need_grad) partial.grad = carve.take<float>(most * slots * B * D);
    partial.splits = grid.splits;
    partial.shortcut = {closed, parts.count};
    bytes = carve.bytes();
  }
};

// The sums of pass k, and the gradient; `stored`: whether the similarities of all rows are there, before and after it.
template <typename S>
int run_pass(const MemoryLossParams<float, S>& p, const Pass& pass, int k, const HalvesWorkspace& w, bool* stored,
             const Gpu& gpu) {
  PartialLoss<float> partial = w.partial;
  partial.splits = w.parts.count;
  if (!pass.weighs()) partial.grad = nullptr;
  ChunkScores<float> chunk = w.chunk;
  int error = launch_begin<float>(p, pass, {k == 0, nullptr}, partial, nullptr, gpu);
  for (chunk.first = 0; chunk.first < p.M && error == cudaSuccess; chunk.first += chunk.chunk) {
    if (!*stored) error = launch_similarities(p, chunk, w.inverse, w.closed, gpu);
    if (error == cudaSuccess) error = launch_scores<float>(p, pass, partial, chunk, gpu);
    if (error == cudaSuccess && partial.grad != nullptr) error = launch_weighted_rows(p, pass, partial, chunk, gpu);
  }
  *stored = p.M <= chunk.chunk && (partial.grad == nullptr || !pass.weighs(0));
  return error;
}

}  // namespace

template <typename S>
int halves(const MemoryLossParams<float, S>& p, const LossSpec& loss, int64_t chunk, const Gpu& gpu) {
  if (p.B == 0 || p.M == 0 || !has_similarities(p.D, gpu)) return sweep(p, loss, true, gpu);
  const bool need_grad = p.grad_z != nullptr && sums_gradients(loss);
  const auto w = make_workspace<HalvesWorkspace>(gpu, p.B, p.M, p.D, chunk, loss, need_grad, gpu.multiprocessors);
  const Program program = make_program(loss, p.grad_z != nullptr);
  int error = cudaMemsetAsync(w.closed, 0, sizeof(*w.closed), static_cast<cudaStream_t>(gpu.stream));
  bool stored = false;
  for (int k = 0; k < program.passes && error == cudaSuccess; ++k) {
    const Pass& pass = program.pass[k];
    PartialLoss<float> of_sweep = w.partial;
    if (!pass.weighs()) of_sweep.grad = nullptr;
    if (k == 0) of_sweep.given = nullptr;
    error = run_pass(p, pass, k, w, &stored, gpu);
    if (error == cudaSuccess) error = launch_sweep_pass(p, pass, of_sweep, w.grid, true, gpu);
    if (error == cudaSuccess) error = launch_settle(p, loss, program, k, w.partial, gpu);
  }
  return error;
}

#define XBN_INSTANTIATE(S, ...) \
  template int halves(const MemoryLossParams<float, S>&, const LossSpec&, int64_t, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
