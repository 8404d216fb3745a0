// What the splits of the bank contribute to a group of anchors, and how it is added up: along a binary tree over the
// splits, by the thread that brings the second of two neighbours. So it takes as much memory as there are threads and
// levels of the tree, whatever the bank's size; no thread waits; and the order, and so every bit, is the same on any
// number of threads.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "sweep.h"

namespace xbn {

// Of one split, or of several that follow each other.
template <typename T>
class Contribution {
 public:
  Contribution(int64_t blocks, int64_t padded, bool gradient, int64_t rewritten)
      : blocks(blocks),
        padded(padded),
        rewritten(rewritten, 0.0),
        has_gradients_(gradient),
        sums_(kSlots * blocks * kAnchorBlock),
        grad_(gradient ? kSlots * blocks * kAnchorBlock * padded : 0),
        touched_(kSlots * blocks, 0) {}

  // Empties a slot.
  void begin(int slot, Formula formula) {
    std::fill_n(sums(slot, 0), blocks * kAnchorBlock, no_sums(formula));
    std::fill_n(&touched(slot, 0), blocks, 0);
  }

  // [64] of a block and of those that follow
  RowSums* sums(int slot, int64_t block) { return sums_.data() + (slot * blocks + block) * kAnchorBlock; }
  // [64][padded] of a block and of those that follow: sum of weight * bank row. Holds garbage until `touched`.
  T* grad(int slot, int64_t block) const { return grad_.data() + (slot * blocks + block) * kAnchorBlock * padded; }
  char& touched(int slot, int64_t block) { return touched_[slot * blocks + block]; }
  bool has_gradients() const { return has_gradients_; }

  const int64_t blocks, padded;
  std::vector<double> rewritten;  // [2, D] sum and sum of squares of the rows, if a map is written into them on the way

 private:
  const bool has_gradients_;
  std::vector<RowSums> sums_;
  Scratch<T> grad_;
  std::vector<char> touched_;
};

// Of all splits to one group of anchors.
template <typename T>
class Accumulation {
 public:
  using Part = std::unique_ptr<Contribution<T>>;

  // rewritten: the size of Contribution::rewritten.
  Accumulation(const SweepPlan& plan, int64_t group, bool gradient, int64_t rewritten)
      : total(std::min(plan.group_blocks, plan.blocks - group * plan.group_blocks), plan.padded_dim, gradient,
              rewritten),
        gradient_(gradient) {
    for (int64_t n = plan.splits; n > 1; n = ceil_div(n, 2)) levels_.emplace_back(n);
  }

  // For a split to fill in: nothing so far, in the slots of a pass.
  Part part(const Pass& pass) {
    Part part = spare();
    if (part == nullptr)
      part = std::make_unique<Contribution<T>>(total.blocks, total.padded, gradient_, total.rewritten.size());
    std::fill(part->rewritten.begin(), part->rewritten.end(), 0.0);
    for (int slot = 0; slot < kSlots; ++slot)
      if (pass.slot[slot].pairs != Pairs::none) part->begin(slot, pass.slot[slot].formula);
    return part;
  }

  // Takes the part of a split. add(left, right) adds the right one to the left one. All of them given, and all threads
  // done, they are in the total.
  template <typename Add>
  void give(int64_t split, Part part, const Add& add) {
    int64_t place = split;
    for (std::vector<Part>& level : levels_) {
      const int64_t neighbour = place ^ 1;
      if (neighbour < static_cast<int64_t>(level.size())) {
        Part other;
        {
          const std::lock_guard lock(mutex_);
          if (level[neighbour] == nullptr) {
            level[place] = std::move(part);
            return;
          }
          other = std::move(level[neighbour]);
        }
        if (neighbour < place) std::swap(part, other);
        add(*part, *other);
        const std::lock_guard lock(mutex_);
        spare_.push_back(std::move(other));
      }
      place /= 2;
    }
    add(total, *part);
    const std::lock_guard lock(mutex_);
    spare_.push_back(std::move(part));
  }

  Contribution<T> total;

 private:
  Part spare() {
    const std::lock_guard lock(mutex_);
    if (spare_.empty()) return nullptr;
    Part part = std::move(spare_.back());
    spare_.pop_back();
    return part;
  }

  const bool gradient_;
  std::mutex mutex_;
  std::vector<std::vector<Part>> levels_;  // those that wait for their neighbour
  std::vector<Part> spare_;
};

}  // namespace xbn
