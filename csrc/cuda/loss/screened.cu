// memory_loss of Contrastive and Margin by a screen and then exact pairs: most negatives are far below the margin, and
// for those it is enough to know that.
//
//   in     as sweep.cu; rows of z and bank are multiples of 16 bytes long, and aligned to that
//   out    as sweep.cu
//   passes one over all of the bank, the screen's: screen.cu. Then exact similarities of what it leaves, with the
//          gradient, pairs.cu. Where it leaves more than `most` of all pairs, the exact kernel returns at once
//          and the sweep runs; otherwise the sweep returns at once. The device decides, and the host does not wait for
//          it.
//   math   as sweep.cu, to the digits of float: no pair that has a weight is missed
//   grid   of the three kernels, each on its own
//   keeps  a bit for each pair, B x M / 8 bytes: 0.5 MB at 64 x 60,000; the partial sums of a sweep, where those of the
//          pairs have their place, too
//   needs  compute capability 8.0
//   order  the same bits every run on the same kind of GPU
#include "pass.cuh"
#include "screen.cuh"
#include "way.h"

namespace xbn::cuda {
namespace {

constexpr int64_t kLeastRowsOfSegment = 256;

// Twice as many warps of the pairs as run at once: some anchors have many more pairs than others. On an H200 too few
// took longer (16 segments 38 us, 32 and 66 28 and 29, of 64 x 60,000 pairs one in a hundred), and each leaves a
// gradient.
constexpr int64_t kPairWarpsOfMultiprocessor = 32;

int64_t plan_segments(int64_t B, int64_t M, int64_t slots, int multiprocessors) {
  const int64_t warps = kPairWarpsOfMultiprocessor * multiprocessors;
  return larger(1, smaller(warps / larger(1, B * slots), ceil_div(M, kLeastRowsOfSegment)));
}

struct ScreenWorkspace {
  SweepGrid grid;
  Screen screen;
  PartialLoss<float> partial;
  int64_t bytes;

  ScreenWorkspace(void* memory, int64_t B, int64_t M, int64_t D, const LossSpec& loss, bool need_grad,
                  int multiprocessors) {
    grid = plan_sweep(B, M, D, multiprocessors);
    const int64_t slots = slots_of(loss), segments = plan_segments(B, M, slots, multiprocessors);
    const int64_t most = larger(grid.splits, segments);
    Carver carve(memory);
    screen = Screen::carve(carve, B, M);
    partial = PartialLoss<float>::carve(carve, most, slots, B);
    if (need_grad) partial.grad = carve.take<float>(most * slots * B * D);
    partial.splits = grid.splits;
    partial.shortcut.splits = segments;
    bytes = carve.bytes();
  }
};

// moving: the bank, where the screen is to move its rows; `p` is of the moved rows.
template <typename S>
int screened_of(const TransformParams<S>* moving, const MemoryLossParams<float, S>& p, const LossSpec& loss,
                double most, const Gpu& gpu) {
  const bool need_grad = p.grad_z != nullptr;
  auto w = make_workspace<ScreenWorkspace>(gpu, p.B, p.M, p.D, loss, need_grad, gpu.multiprocessors);
  PartialLoss<float>& partial = w.partial;
  partial.shortcut.closed = w.screen.many;
  const Program program = make_program(loss, need_grad);
  const Pass& pass = program.pass[0];
  PartialLoss<float> of_pass = partial;
  of_pass.given = nullptr;
  const float margin = static_cast<float>(pass.slot[0].b);
  int error = launch_screen(moving, p, margin, screen_bound(p.D), w.screen, gpu);
  if (error == cudaSuccess) error = launch_pairs(p, pass, w.screen, most, of_pass, gpu);
  if (error == cudaSuccess) error = launch_sweep_pass(p, pass, of_pass, w.grid, true, gpu);
  if (error == cudaSuccess) error = launch_settle(p, loss, program, 0, partial, gpu);
  return error;
}

}  // namespace

template <typename S>
int screened(const MemoryLossParams<float, S>& p, const LossSpec& loss, double most, const Gpu& gpu) {
  if (p.B == 0 || p.M == 0 || p.M > INT32_MAX) return sweep(p, loss, true, gpu);
  return screened_of<S>(nullptr, p, loss, most, gpu);
}

int screened_in_place(const TransformParams<float>& t, const MemoryLossParams<float, float>& p, const LossSpec& loss,
                      double most, const Gpu& gpu) {
  MemoryLossParams<float, float> moved = p;
  moved.scale = moved.shift = nullptr;
  const int error = screened_of(&t, moved, loss, most, gpu);
  return error != cudaSuccess ? error : follow(t, gpu);
}

#define XBN_INSTANTIATE(S, ...) \
  template int screened(const MemoryLossParams<float, S>&, const LossSpec&, double, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
