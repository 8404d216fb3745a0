// memory_loss, fused: the loss of B anchors against the bank and its derivative by the anchors, in one sweep.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null; rows [0, count) count; D <= 1024.
//          float32; on tensor cores the bank may be of 16 bits
//   out    what settle.cu adds up: of every split, slot and anchor its sums, [splits, slots, B], and the sum of
//          weight * row, [splits, slots, B, D]; state [B] of the anchors
//   passes one for most losses; losses.h says which pairs each takes, and into which slots. Two slots of a pass are two
//          sweeps in the same launch. That of positives skips the tiles without a label of the block's anchors. With 16
//          of 11,318 labels in the batch it skips nine of ten; with few classes it skips none, and the loss costs twice
//          as much.
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          sums_i = sum_j of what the slot's formula says of s_ij,  grad_i = sum_j weight(s_ij) r_j; weights of
//          exponents are e^(x - largest x so far), so a larger one scales down sums and gradient of the tiles before
//   grid   (blocks of 64 anchors, 32 above D = 512) x splits of the bank x slots, 256 threads. A block takes its share
//          of the bank, which is as many tiles of 64 rows as another's or one more, each in three phases:
//            1 similarities  64 x 64; operands pass through shared memory 32 columns at a time, the next ones on their
//                            way meanwhile; the rows' norms fall out on the side
//            2 scores        value and weight of every pair; rows without an active pair are dropped
//            3 gradient      weights x the rows that are left, read a second time: a tile of all D columns would not
//                            fit shared memory, and is still in the second-level cache. The sums of all D columns stay
//                            in registers until the last tile, 128 a thread at D = 512
//          The kernel is in sweep.cuh, phase 2 in score.cuh. The products of 1 and 3 are there twice: in
//          ordinary arithmetic, products_simt.cuh, and on tensor cores, products_tensor.cuh.
//          The similarities never leave the block: nothing of size B x M exists.
//   keeps  the partial sums in the workspace: with one slot, 64 x D floats for each block that runs at once; on 132
//          multiprocessors with B = 64, D = 512: 17 MB, with two slots twice that
//   needs  16-byte loads of z and bank where D and the addresses allow them, as the tensor cores' products need them;
//          36 to 42 KB of shared memory; no spills
//   digits products, scores and the sums of a tile in float; tiles, splits and anchors are added in double, except
//          for the gradient. scale and shift are rounded to float once.
//   order  splits by shape and number of multiprocessors, rows of a split in order, splits added in order:
//          the same bits every run on the same kind of GPU
#include "sweep.cuh"
#include "way.h"

namespace xbn::cuda {

SweepGrid plan_sweep(int64_t B, int64_t M, int64_t D, int multiprocessors) {
  const int dim = padded_dim(D), anchors = anchors_of_block(dim), resident = multiprocessors * blocks_at_once(dim);
  const int64_t blocks = larger(1, ceil_div(B, anchors));
  return {blocks, larger(1, smaller(resident / blocks, ceil_div(M, kTile)))};
}

template <typename S>
int launch_sweep_pass(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
                      const SweepGrid& grid, bool tensor, const Gpu& gpu) {
  if constexpr (std::is_same_v<S, float>)
    if (!tensor) return launch_pass<false>(p, pass, partial, grid, is_wide(p), gpu);
  return launch_pass<true>(p, pass, partial, grid, true, gpu);
}

namespace {

struct SweepWorkspace {
  PartialLoss<float> partial;
  int64_t bytes;

  SweepWorkspace(void* memory, const SweepGrid& grid, const LossSpec& loss, int64_t B, int64_t D, bool need_grad) {
    Carver carve(memory);
    const int64_t slots = slots_of(loss);
    partial = PartialLoss<float>::carve(carve, grid.splits, slots, B);
    if (need_grad && sums_gradients(loss)) partial.grad = carve.take<float>(grid.splits * slots * B * D);
    bytes = carve.bytes();
  }
};

}  // namespace

template <typename S>
int sweep(const MemoryLossParams<float, S>& p, const LossSpec& loss, bool tensor, const Gpu& gpu) {
  const SweepGrid plan = plan_sweep(p.B, p.M, p.D, gpu.multiprocessors);
  const PartialLoss<float> partial =
      make_workspace<SweepWorkspace>(gpu, plan, loss, p.B, p.D, p.grad_z != nullptr).partial;
  const Program program = make_program(loss, p.grad_z != nullptr);
  for (int k = 0; k < program.passes; ++k) {
    const Pass& pass = program.pass[k];
    PartialLoss<float> of_pass = partial;
    if (!pass.weighs()) of_pass.grad = nullptr;
    if (k == 0) of_pass.given = nullptr;  // nothing has been written there
    int error = launch_sweep_pass(p, pass, of_pass, plan, tensor, gpu);
    if (error == cudaSuccess) error = launch_settle(p, loss, program, k, partial, gpu);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#define XBN_INSTANTIATE(S, ...)                                                                             \
  template int launch_sweep_pass(const MemoryLossParams<float, S>&, const Pass&, const PartialLoss<float>&, \
                                 const SweepGrid&, bool, const Gpu&);                                       \
  template int sweep(const MemoryLossParams<float, S>&, const LossSpec&, bool, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
