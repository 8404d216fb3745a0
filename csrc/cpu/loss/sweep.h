// A sweep over the bank: how it is cut up, and the memory it works in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../kernels.h"
#include "../../math/losses.h"
#include "../cpu.h"
#include "labels.h"
#include "scratch.h"

namespace xbn {

constexpr int64_t kAnchorBlock = 64;   // anchors that are multiplied together
constexpr int64_t kMaxTileRows = 96;   // bank rows of a tile, at most kScoredRows
constexpr int64_t kTileUnit = 6;       // bank rows that the similarity kernel takes at a time
constexpr int kPairChains = 8;         // of whose sums a similarity is one that may be computed alone
constexpr int64_t kWholeVectors = 16;  // dimensions are padded to whole vectors of the widest instruction set

// How a sweep is cut up. It depends on the shapes alone, never on the number of threads, so the same input gives the
// same bits on any number of threads.
struct SweepPlan {
  int64_t blocks;        // anchors come in blocks of kAnchorBlock, the last one padded with zeros
  int64_t group_blocks;  // anchor blocks that share one reading of a bank tile
  int64_t groups;        // ceil(blocks / group_blocks)
  int64_t tile_rows;     // bank rows held in cache at a time
  int64_t split_rows;    // bank rows of one split, a multiple of tile_rows
  int64_t splits;        // ceil(count / split_rows), at least 1
  int64_t padded_dim;    // D rounded up to whole vectors

  // For B anchors, `count` bank rows and dimension D of `element_size` bytes each.
  static SweepPlan make(int64_t B, int64_t count, int64_t D, int64_t element_size) {
    constexpr int64_t kTileBytes = 192 << 10;  // a tile and the anchors, in a second-level cache
    constexpr int64_t kGroupBlocks = 4;        // 256 anchors amortise the reading of a tile
    constexpr int64_t kSplitRows = 1 << 10;    // adding a split's gradients then takes a hundredth of its time
    constexpr int64_t kMinSplits = 4, kMaxSplits = 64;

    SweepPlan plan;
    plan.padded_dim = round_up(D, kWholeVectors);
    plan.blocks = ceil_div(B, kAnchorBlock);
    plan.groups = ceil_div(plan.blocks, kGroupBlocks);
    plan.group_blocks = plan.groups > 0 ? ceil_div(plan.blocks, plan.groups) : 1;
    const int64_t fitting = kTileBytes / (plan.padded_dim * element_size);
    plan.tile_rows = std::clamp(fitting / kTileUnit * kTileUnit, kTileUnit, kMaxTileRows);
    const int64_t wanted = std::clamp(count / kSplitRows, kMinSplits, kMaxSplits);
    plan.split_rows = round_up(std::max<int64_t>(ceil_div(count, wanted), 1), plan.tile_rows);
    plan.splits = std::max<int64_t>(ceil_div(count, plan.split_rows), 1);
    return plan;
  }
};

// The plan of one sweep, and its operands made ready.
template <typename T>
class Sweep {
 public:
  template <typename S>
  explicit Sweep(const MemoryLossParams<T, S>& p)
      : count(p.count != nullptr ? *p.count : p.M),
        plan(SweepPlan::make(p.B, count, p.D, static_cast<int64_t>(sizeof(T)))),
        labels(p.labels, p.exclude, p.B, rows()),
        finite(rows(), 1),
        given(rows(), T(0)),
        from(labels.distinct_labels.size(), 0),
        to(labels.distinct_labels.size(), count),
        anchors_(plan.blocks * p.D * kAnchorBlock),
        block_size_(p.D * kAnchorBlock) {
    if (p.scale != nullptr && !is_identity(p.scale, p.shift, p.D)) {
      scale.assign(p.scale, p.scale + p.D);
      shift.assign(p.shift, p.shift + p.D);
    }
  }

  static bool is_identity(const double* scale, const double* shift, int64_t D) {
    return std::all_of(scale, scale + D, [](double a) { return a == 1; }) &&
           std::all_of(shift, shift + D, [](double b) { return b == 0; });
  }

  int64_t rows() const { return plan.blocks * kAnchorBlock; }

  // [D][64] the anchors of a block side by side.
  T* anchors(int64_t block) const { return anchors_.data() + block * block_size_; }

  const int64_t count;  // bank rows
  const SweepPlan plan;
  const AnchorLabels labels;
  std::vector<char> finite;       // [rows] whether every value of the anchor is
  std::vector<T> given;           // [rows] what the pass at hand is given for each anchor
  std::vector<int64_t> from, to;  // [distinct labels] the rows of a label that a pass of positives alone looks at
  std::vector<T> scale, shift;    // [D] pending map of the bank; empty if it changes nothing

 private:
  Scratch<T> anchors_;
  int64_t block_size_;
};

// Bank rows that are processed together.
template <typename T>
struct Tile {
  explicit Tile(const SweepPlan& plan)
      : capacity(plan.tile_rows),
        copy(round_up(capacity, kTileUnit) * plan.padded_dim),
        inverse_norm(round_up(capacity, kTileUnit)),
        bank_row(capacity),
        label(capacity),
        excluded(capacity),
        mixed(capacity) {}

  // Takes rows of [begin, end), all or only those that a pass of positives looks at. Returns the first row left.
  int64_t choose(const Sweep<T>& sweep, const int64_t* bank_labels, const int64_t* bank_ids, int64_t begin, int64_t end,
                 bool positives_only) {
    for (rows = 0; begin < end && rows < capacity; ++begin) {
      const int32_t found = sweep.labels.distinct_labels.index_of(bank_labels[begin]);
      if (positives_only && (found == kNoAnchor || begin < sweep.from[found] || begin >= sweep.to[found])) continue;
      bank_row[rows] = begin;
      label[rows] = found;
      excluded[rows] = sweep.labels.ids.index_of(bank_ids != nullptr ? bank_ids[begin] : begin);
      mixed[rows] = found != kNoAnchor || excluded[rows] != kNoAnchor;
      ++rows;
    }
    return begin;
  }

  ScoredRows scored() const { return {rows, bank_row.data(), label.data(), excluded.data(), mixed.data()}; }

  const int64_t capacity;
  int64_t rows = 0;
  const T* data = nullptr;        // [rows][padded_dim], not normalised: `copy`, or the bank's own rows
  Scratch<T> copy;                // [capacity][padded_dim]
  std::vector<T> inverse_norm;    // [capacity]
  std::vector<int64_t> bank_row;  // ascending
  std::vector<int32_t> label;     // index of the row's label among the anchors', or kNoAnchor
  std::vector<int32_t> excluded;  // index of the row's id among the excluded ones, or kNoAnchor
  std::vector<char> mixed;        // whether the row is anything but a negative of all anchors
};

// An anchor's sums over the whole bank, and what its gradients are multiplied by.
struct Total {
  SlotSums sums;
  double factor[kSlots] = {0, 0};
};

}  // namespace xbn
