// memory_loss: the loss of B anchors against the bank and its derivative by the anchors, in one sweep.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], of which rows [0, count) count
//   out    loss [1], grad_z [B, D]
//   math   r_j = scale * u_j + shift, divided by max(|r_j|, eps) if renormalize;  s_ij = z_i . r_j
//          loss = sum_ij value(s_ij),  grad_z_i = sum_j weight(s_ij) r_j, positives and negatives apart, because
//          some reductions scale them apart. The bank carries no gradient, so that is the whole derivative.
//   sweep  the bank goes by in tiles that stay in cache. A tile is converted, mapped and normalised once, then
//          each block of 64 anchors multiplies it (similarities), scores the pairs, and multiplies it again with
//          the weights (gradient), skipping the rows in which no pair is active. Nothing of size B x M or M x D
//          exists.
//   split  by shape alone (plan_sweep); every split has its own sums, added in order: the same bits on any
//          number of threads
#include "loss.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace xbn {
namespace {

constexpr int64_t kAnchorBlock = 64;
constexpr int64_t kPadding = 16;  // dimensions are padded to whole vectors of the widest instruction set
constexpr int64_t kTileUnit = 6;  // bank rows that the similarity kernel takes at a time
constexpr int64_t kAlignment = 64;
constexpr int32_t kNoAnchor = -1;      // label group of a bank row that is nobody's positive
constexpr int32_t kPaddedAnchor = -2;  // label group of the anchors that fill up the last block

enum Kind { kNegative = 0, kPositive = 1, kKinds = 2 };

// Uninitialised cache-aligned memory: the parts of a workspace that no pair touches are never paged in.
template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t n)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t{kAlignment}))) {}
  ~Workspace() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// What all units of one sweep share.
template <typename T>
struct Sweep {
  SweepPlan plan;
  T* anchors;                   // [blocks][D][64], the anchors of a block side by side
  int32_t* anchor_group;        // [blocks * 64] index of the label in `groups`, or kPaddedAnchor
  std::vector<int64_t> groups;  // the anchors' distinct labels, sorted
  T* scale;                     // [padded_dim] or null
  T* shift;                     // [padded_dim]
  RowSums* sums;                // [splits][kinds][blocks * 64]
  T* grad;                      // [splits][kinds][blocks * 64][padded_dim]
  char* touched;                // [splits][kinds][blocks] whether that part of `grad` was ever written

  int64_t rows() const { return plan.blocks * kAnchorBlock; }
  RowSums* sums_of(int64_t split, int kind) const { return sums + (split * kKinds + kind) * rows(); }
  T* grad_of(int64_t split, int kind, int64_t block) const {
    return grad + ((split * kKinds + kind) * rows() + block * kAnchorBlock) * plan.padded_dim;
  }
  char& touched_of(int64_t split, int kind, int64_t block) const {
    return touched[(split * kKinds + kind) * plan.blocks + block];
  }
};

// The index of a label among the distinct labels of the anchors, or kNoAnchor.
int32_t find_group(const std::vector<int64_t>& groups, int64_t label) {
  const auto it = std::lower_bound(groups.begin(), groups.end(), label);
  return it != groups.end() && *it == label ? static_cast<int32_t>(it - groups.begin()) : kNoAnchor;
}

}  // namespace

#define XBN_ISA_SOURCE "loss_kernel.h"
#include "for_each_isa.h"

SweepPlan plan_sweep(int64_t B, int64_t count, int64_t D, int64_t element_size) {
  constexpr int64_t kTileBytes = 192 << 10;    // a tile in half of a 512 KiB second-level cache
  constexpr int64_t kMaxTileRows = 96;         //
  constexpr int64_t kGroupBlocks = 4;          // 256 anchors amortise the reading of a tile
  constexpr int64_t kGradientBytes = 8 << 20;  // for the gradients of all splits of a group
  constexpr int64_t kMinSplits = 4, kMaxSplits = 64;

  SweepPlan plan;
  plan.padded_dim = round_up(D, kPadding);
  plan.blocks = ceil_div(B, kAnchorBlock);
  plan.group_blocks = std::clamp<int64_t>(plan.blocks, 1, kGroupBlocks);
  plan.groups = ceil_div(plan.blocks, plan.group_blocks);
  const int64_t fitting = kTileBytes / (plan.padded_dim * element_size);
  plan.tile_rows = std::clamp(fitting / kTileUnit * kTileUnit, kTileUnit, kMaxTileRows);
  const int64_t split_bytes = kKinds * plan.group_blocks * kAnchorBlock * plan.padded_dim * element_size;
  const int64_t wanted = std::clamp(kGradientBytes / split_bytes, kMinSplits, kMaxSplits);
  plan.split_rows = round_up(std::max<int64_t>(ceil_div(count, wanted), 1), plan.tile_rows);
  plan.splits = std::max<int64_t>(ceil_div(count, plan.split_rows), 1);
  return plan;
}

template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const Contrastive<T>& loss, const Cpu& cpu) {
  Sweep<T> sweep;
  sweep.plan = plan_sweep(p.B, p.count, p.D, static_cast<int64_t>(sizeof(T)));
  const SweepPlan& plan = sweep.plan;

  Workspace<T> anchors(plan.blocks * p.D * kAnchorBlock);
  Workspace<T> grad(p.grad_z ? plan.splits * kKinds * sweep.rows() * plan.padded_dim : 0);
  std::vector<int32_t> anchor_group(sweep.rows(), kPaddedAnchor);
  std::vector<RowSums> sums(plan.splits * kKinds * sweep.rows(), RowSums{0, 0});
  std::vector<char> touched(plan.splits * kKinds * plan.blocks, 0);
  std::vector<T> scale, shift;
  if (p.scale != nullptr) {
    scale.assign(p.scale, p.scale + p.D);
    shift.assign(p.shift, p.shift + p.D);
  }
  sweep.anchors = anchors.data();
  sweep.anchor_group = anchor_group.data();
  sweep.groups.assign(p.labels, p.labels + p.B);
  std::sort(sweep.groups.begin(), sweep.groups.end());
  sweep.groups.erase(std::unique(sweep.groups.begin(), sweep.groups.end()), sweep.groups.end());
  for (int64_t i = 0; i < p.B; ++i) anchor_group[i] = find_group(sweep.groups, p.labels[i]);
  sweep.scale = p.scale ? scale.data() : nullptr;
  sweep.shift = p.scale ? shift.data() : nullptr;
  sweep.sums = sums.data();
  sweep.grad = grad.data();
  sweep.touched = touched.data();

  cpu.parallel(plan.blocks, [&](int64_t block) { XBN_CALL_ISA(cpu.isa, pack_anchors(p, sweep, block)); });
  cpu.parallel(plan.groups * plan.splits, [&](int64_t unit) {
    XBN_CALL_ISA(cpu.isa, sweep_unit(p, sweep, loss, unit / plan.splits, unit % plan.splits));
  });

  // Every reduction is a factor per kind: loss = sum over kinds of factor * sum of values.
  double value[kKinds] = {0, 0}, active[kKinds] = {0, 0}, rows = 0;
  for (int64_t i = 0; i < p.B; ++i) {
    if (p.anchors != nullptr && !p.anchors[i]) continue;
    rows += 1;
    for (int kind = 0; kind < kKinds; ++kind)
      for (int64_t split = 0; split < plan.splits; ++split) {
        value[kind] += sweep.sums_of(split, kind)[i].value;
        active[kind] += sweep.sums_of(split, kind)[i].active;
      }
  }
  double factor[kKinds], total = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    factor[kind] = 1.0 / std::max(p.mean ? rows : active[kind], 1.0);
    total += factor[kind] * value[kind];
  }
  *p.loss = static_cast<T>(total);
  if (p.grad_z == nullptr) return;
  const T weight[kKinds] = {static_cast<T>(factor[kNegative]), static_cast<T>(factor[kPositive])};
  cpu.parallel(p.B, [&](int64_t i) { XBN_CALL_ISA(cpu.isa, reduce_gradient(p, sweep, weight, i)); });
}

#define XBN_INSTANTIATE(T, S) \
  template void memory_loss(const MemoryLossParams<T, S>&, const Contrastive<T>&, const Cpu&);
XBN_INSTANTIATE(float, float)
XBN_INSTANTIATE(float, double)
XBN_INSTANTIATE(double, float)
XBN_INSTANTIATE(double, double)
#undef XBN_INSTANTIATE

}  // namespace xbn
