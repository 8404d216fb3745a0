// memory_loss, fused: the loss of B anchors against the bank and its derivative by the anchors, in one sweep. float32.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null, of which rows [0, count) count; D <= 1024
//   out    what loss_reduce.cu adds up: of every split, slot and anchor its sums, [splits, slots, B], and the sum of
//          weight * row, [splits, slots, B, D]; state [B] of the anchors
//   passes one for most losses; losses.h says which pairs each takes, and into which slots. Two slots of a pass are two
//          sweeps in the same launch. That of positives skips the tiles in which no row has a label of the block's anchors:
//          nine of ten with 16 labels in the batch of 11,318, none of few classes, where the loss then costs twice as much.
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          sums_i = sum_j of what the slot's formula says of s_ij,  grad_i = sum_j weight(s_ij) r_j; weights of exponents
//          are e^(x - largest x so far), so a larger one scales down sums and gradient of the tiles before
//   grid   (blocks of 64 anchors, 32 above D = 512) x splits of the bank x slots, 256 threads. A block takes its share
//          of the bank in tiles of 64 rows, each in three phases:
//            1 similarities  64 x 64; operands pass through shared memory 32 columns at a time, the next ones on their
//                            way meanwhile; the rows' norms fall out on the side
//            2 scores        value and weight of every pair; rows in which no pair is active are dropped
//            3 gradient      weights x the rows that are left, read a second time: a tile of all D columns would not
//                            fit shared memory, and is still in the second-level cache. The sums of all D columns stay
//                            in registers until the last tile, 128 a thread at D = 512
//          Phase 2 is in loss_score.cuh. The products of 1 and 3 are there twice: in ordinary arithmetic, loss_simt.cuh,
//          and on tensor cores, loss_tensor.cuh.
//          The similarities never leave the block: nothing of size B x M exists.
//   keeps  the partial sums in the workspace: with one slot, 64 x D floats for each block that runs at once; on 132
//          multiprocessors with B = 64, D = 512: 17 MB, with two slots twice that
//   needs  16-byte loads of z and bank where D and the addresses allow them, as the tensor cores' products need them; 36 to
//          42 KB of shared memory; no spills
//   digits products, scores and the sums of a tile in float; tiles, splits and anchors are added in double, but for the
//          gradient. scale and shift are rounded to float once.
//   order  splits by shape and number of multiprocessors, rows of a split in order, splits added in order:
//          the same bits every run on the same kind of GPU
#include <type_traits>

#include "loss_score.cuh"
#include "loss_simt.cuh"
#include "loss_tensor.cuh"

namespace xbn::cuda {
namespace {

// Anchors of this block. Those that fill it up, and those that are none, have no kRanks and pair with nobody.
template <int kDim>
__device__ void load_anchors(const MemoryLossParams<float, float>& p, Shared<kDim>& shared, int64_t first,
                             const PartialLoss<float>& partial, bool reports) {
  for (int k = threadIdx.x / kWarp; k < Shape<kDim>::kAnchors; k += kThreads / kWarp) {
    const int64_t i = first + k;
    Anchor<float> anchor = {0, kNoId, 0, kFinite};
    if (i < p.B) {
      anchor.label = p.labels[i];
      anchor.exclude = excluded_id(p, i);
      if (partial.given != nullptr) anchor.given = partial.given[i];
      anchor.state = anchor_state(p, i);
      if (reports && threadIdx.x % kWarp == 0) partial.state[i] = anchor.state;
    }
    if (threadIdx.x % kWarp == 0) shared.anchors[k] = anchor;
  }
}

template <int kDim, bool kTensor>
__global__ void __launch_bounds__(kThreads, Shape<kDim>::kBlocks)
    sweep_kernel(const MemoryLossParams<float, float> p, const Pass pass, const PartialLoss<float> partial, bool wide) {
  using Sizes = Shape<kDim>;
  using Products = std::conditional_t<kTensor && kHasTensorCores, TensorProducts<kDim>, SimtProducts<kDim>>;
  __shared__ Shared<kDim> shared;
  const int thread = threadIdx.x;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.x) * Sizes::kAnchors;
  const int k = pass.slot[0].pairs == Pairs::none ? 1 : static_cast<int>(blockIdx.z);
  load_anchors(p, shared, first_anchor, partial, blockIdx.y == 0 && blockIdx.z == 0);
  // In shared memory it takes no registers; indexed at run time it would be copied to the stack.
  if (thread == 0) shared.slot = k == 0 ? pass.slot[0] : pass.slot[1];
  __syncthreads();
  if (thread < Sizes::kAnchors) shared.sums[thread] = no_sums(shared.slot.formula);
  for (int d = thread; d < kDim; d += kThreads) {
    shared.scale[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f;
    shared.shift[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f;
  }

  const int64_t count = stored_rows(p.count, p.M), tiles = ceil_div(count, kTile);
  const int64_t tiles_of_split = ceil_div(tiles, gridDim.y);
  const int64_t first_row = blockIdx.y * tiles_of_split * kTile;
  const int64_t end = smaller(first_row + tiles_of_split * kTile, count);

  Products products;
  for (int64_t begin = first_row; begin < end; begin += kTile) {
    const int rows = static_cast<int>(smaller(kTile, end - begin));
    if (thread < kTile) {
      shared.labels[thread] = thread < rows ? p.bank_labels[begin + thread] : 0;
      shared.ids[thread] = thread < rows ? row_id(p, begin + thread) : 0;
    }
    prefetch_by_block<kThreads>(p.bank + (begin + kTile) * p.D, smaller(kTile, end - begin - kTile) * p.D);
    __syncthreads();
    if (shared.slot.pairs == Pairs::positives) {
      const int at = hidden(thread), x = at % kSide, y = at / kSide;
      bool match = false;
      for (int k = y; k < Sizes::kAnchors; k += kSide)
        for (int j = x; j < rows; j += kSide)
          match = match || ((shared.anchors[k].state & kRanks) && shared.anchors[k].label == shared.labels[j]);
      if (!__syncthreads_or(match)) continue;
    }
    float dot[Sizes::kSquare][4] = {};
    Products::similarities(p, shared, first_anchor, begin, rows, wide, dot);
    const Scored scored = score_tile<kDim>(shared, begin, rows, partial.grad != nullptr, dot);
    if (scored.rescale) products.rescale(shared.rescale);
    if (partial.grad != nullptr) products.add(p, shared, begin, scored.rows, wide);
  }

  __syncthreads();
  const int64_t slice = (blockIdx.y * partial.slots + k) * p.B;  // [B] of this split and slot
  if (thread < Sizes::kAnchors && first_anchor + thread < p.B)
    partial.sums[slice + first_anchor + thread] = shared.sums[thread];
  if (partial.grad == nullptr) return;
  products.store(partial.grad + (slice + first_anchor) * p.D, p.B - first_anchor, p.D, wide);
}

// The smallest of the five sizes that holds D columns.
int padded_dim(int64_t D) {
  int dim = 64;
  while (dim < D) dim *= 2;
  return dim;
}

struct Plan {
  int64_t blocks;  // of anchors
  int64_t splits;  // of the bank: as many blocks in all as run at once
};

Plan plan_sweep(int64_t B, int64_t M, int64_t D, int multiprocessors) {
  const int dim = padded_dim(D), anchors = anchors_of_block(dim), resident = multiprocessors * blocks_at_once(dim);
  const int64_t blocks = larger(1, ceil_div(B, anchors));
  return {blocks, larger(1, smaller(resident / blocks, ceil_div(M, kTile)))};
}

PartialLoss<float> partial_loss(Carver& carve, const Plan& plan, const LossSpec& loss, int64_t B, int64_t D,
                                bool need_grad) {
  const int64_t slots = slots_of(loss);
  PartialLoss<float> partial = PartialLoss<float>::carve(carve, plan.splits, slots, B);
  if (need_grad && sums_gradients(loss)) partial.grad = carve.take<float>(plan.splits * slots * B * D);
  return partial;
}

template <int kDim>
int launch_sweep_of(const MemoryLossParams<float, float>& p, const Pass& pass, const PartialLoss<float>& partial,
                    const Plan& plan, bool tensor, const Launch& launch) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool wide = p.D % 4 == 0 && aligned(p.z) && aligned(p.bank);
  const bool both = pass.slot[0].pairs != Pairs::none && pass.slot[1].pairs != Pairs::none;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits), both ? 2 : 1);
  const auto kernel = tensor && wide ? sweep_kernel<kDim, true> : sweep_kernel<kDim, false>;
  return run(kernel, grid, kThreads, launch, p, pass, partial, wide);
}

}  // namespace

int64_t sweep_workspace(int64_t B, int64_t M, int64_t D, const LossSpec& loss, bool need_grad, int multiprocessors) {
  Carver carve(nullptr);
  partial_loss(carve, plan_sweep(B, M, D, multiprocessors), loss, B, D, need_grad);
  return carve.bytes();
}

int launch_sweep(const MemoryLossParams<float, float>& p, const LossSpec& loss, bool tensor, const Launch& launch) {
  const Plan plan = plan_sweep(p.B, p.M, p.D, launch.multiprocessors);
  Carver carve(launch.workspace);
  const PartialLoss<float> partial = partial_loss(carve, plan, loss, p.B, p.D, p.grad_z != nullptr);
  const Program program = make_program(loss);
  for (int k = 0; k < program.passes; ++k) {
    const Pass& pass = program.pass[k];
    PartialLoss<float> of_pass = partial;
    if (!pass.gradient) of_pass.grad = nullptr;
    if (k == 0) of_pass.given = nullptr;  // nothing has been written there
    int error = cudaErrorInvalidValue;
    switch (padded_dim(p.D)) {
      case 64: error = launch_sweep_of<64>(p, pass, of_pass, plan, tensor, launch); break;
      case 128: error = launch_sweep_of<128>(p, pass, of_pass, plan, tensor, launch); break;
      case 256: error = launch_sweep_of<256>(p, pass, of_pass, plan, tensor, launch); break;
      case 512: error = launch_sweep_of<512>(p, pass, of_pass, plan, tensor, launch); break;
      case 1024: error = launch_sweep_of<1024>(p, pass, of_pass, plan, tensor, launch); break;
    }
    if (error == cudaSuccess) error = launch_settle(p, loss, k, partial, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace xbn::cuda
