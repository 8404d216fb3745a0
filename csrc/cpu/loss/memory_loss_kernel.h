// Compiled once per instruction set: see for_each_isa.h. What one unit of a sweep does, and how its parts become a
// gradient. The multiply-adds are in products_kernel.h.

#include "../../math/pair_formulas.h"
#include "../transform_kernel.h"
#include "vectors_kernel.h"

#include "products_kernel.h"
#include "score_kernel.h"

#include "triplets_kernel.h"

#include "pairs_kernel.h"

// The anchors of a block side by side, those that are not finite all NaN.
template <typename T, typename S>
void pack_anchors(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, int64_t block) {
  T* packed = sweep.anchors(block);
  const int64_t first = block * kAnchorBlock, rows = std::min(kAnchorBlock, p.B - first);
  if (rows < kAnchorBlock) std::fill_n(packed, p.D * kAnchorBlock, T(0));
  transpose(p.z + first * p.D, p.D, rows, p.D, packed, kAnchorBlock);
  for (int64_t i = 0; i < rows; ++i) {
    const T* z = p.z + (first + i) * p.D;
    T zero = 0;  // stays 0 as long as every value is finite
#pragma omp simd reduction(+ : zero)
    for (int64_t d = 0; d < p.D; ++d) zero += T(0) * z[d];
    sweep.finite[first + i] = zero == T(0);
    for (int64_t d = 0; zero != T(0) && d < p.D; ++d)
      packed[d * kAnchorBlock + i] = std::numeric_limits<T>::quiet_NaN();
  }
}

// Bank row j converted and mapped, but not yet normalised. Returns its inverse norm.
template <typename T, typename S>
T load_row(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, int64_t j, T* r) {
  const S* u = p.bank + j * p.D;
  T square = 0;
  if (!sweep.scale.empty()) {
    const T* scale = sweep.scale.data();
    const T* shift = sweep.shift.data();
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < p.D; ++d) {
      r[d] = scale[d] * as<T>(u[d]) + shift[d];
      square += r[d] * r[d];
    }
  } else {
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < p.D; ++d) {
      r[d] = as<T>(u[d]);
      square += r[d] * r[d];
    }
  }
  return p.renormalize ? inverse_of_norm(square, static_cast<T>(p.eps)) : T(1);
}

// Whether the sweep can use the tile's rows where they lie in the bank: nothing is to be done to them.
template <typename T, typename S>
bool lies_in_bank(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, const Tile<T>& tile) {
  const int64_t padded = sweep.plan.padded_dim, whole = round_up(tile.rows, kTileUnit);
  return std::is_same_v<T, S> && sweep.scale.empty() && padded == p.D && whole == tile.rows &&
         tile.bank_row[tile.rows - 1] - tile.bank_row[0] == tile.rows - 1;
}

// Rows [first, last) of the tile, each padded with zeros to whole vectors, and their inverse norms.
template <typename T, typename S>
void load_rows(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, int64_t first, int64_t last, Tile<T>& tile) {
  const int64_t padded = sweep.plan.padded_dim;
  if (tile.data != tile.copy.data()) {
    std::fill(tile.inverse_norm.begin() + first, tile.inverse_norm.begin() + last, T(1));
    if (p.renormalize)
      fold_rows(tile.data + first * padded, last - first, padded, SumOfSquares<T>(), [&](int64_t j, T square) {
        tile.inverse_norm[first + j] = inverse_of_norm(square, static_cast<T>(p.eps));
      });
    return;
  }
  for (int64_t j = first; j < last; ++j) {
    T* r = tile.copy.data() + j * padded;
    tile.inverse_norm[j] = load_row(p, sweep, tile.bank_row[j], r);
    for (int64_t d = p.D; d < padded; ++d) r[d] = T(0);
  }
}

// The tile's rows, and rows of zeros to a whole unit. What is done to a row before the products is done to a few at a
// time, while they are in the first-level cache: a pending map is written into the bank, the norm is taken, and if they
// are to be screened they are encoded. rewrite may be null; its map is that of all rows from `begin` on.
template <typename T, typename S>
void load_tile(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, const Rewrite<S>* rewrite, int64_t begin,
               PairScreen<T>& screening, Contribution<T>& part, Tile<T>& tile) {
  constexpr int64_t kFirstLevel = 16 << 10;
  const int64_t padded = sweep.plan.padded_dim, whole = round_up(tile.rows, kTileUnit);
  const int64_t some = padded * static_cast<int64_t>(sizeof(T)) * 16 <= kFirstLevel ? 16 : 8;
  tile.data = tile.copy.data();
  if constexpr (std::is_same_v<T, S>)
    if (lies_in_bank(p, sweep, tile)) tile.data = p.bank + tile.bank_row[0] * p.D;
  for (int64_t first = 0; first < tile.rows; first += some) {
    const int64_t last = std::min(first + some, tile.rows);
    if constexpr (std::is_same_v<T, S>)
      if (rewrite != nullptr)
        transform_rows(rewrite->bank + (begin + first) * p.D, last - first, p.D, rewrite->scale.data(),
                       rewrite->shift.data(), part.rewritten.data(), part.rewritten.data() + p.D);
    load_rows(p, sweep, first, last, tile);
    screening.encode(tile, first, last);
  }
  if (tile.data != tile.copy.data()) return;
  std::fill(tile.copy.data() + tile.rows * padded, tile.copy.data() + whole * padded, T(0));
  std::fill(tile.inverse_norm.begin() + tile.rows, tile.inverse_norm.begin() + whole, T(0));
}

// The anchors of a group against the bank rows of a split. triplets, rewrite and screen may be null.
template <typename T, typename S>
void sweep_unit(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, Triplets<T, kAnchorBlock>* triplets,
                Rewrite<S>* rewrite, const Screen* screen, const Pass& pass, int64_t group, int64_t split,
                Contribution<T>& part) {
  const SweepPlan& plan = sweep.plan;
  const int64_t first_block = group * plan.group_blocks;
  const int64_t last_block = std::min(first_block + plan.group_blocks, plan.blocks);
  const int64_t end = std::min((split + 1) * plan.split_rows, sweep.count), padded = plan.padded_dim;
  const bool positives_only = pass.slot[0].pairs == Pairs::none;
  const bool gradient = pass.weighs() && p.grad_z != nullptr;
  const bool in_chains = std::is_same_v<T, float> && may_be_screened(pass);

  Tile<T> tile(plan);
  Scratch<T> weights(kSlots * plan.tile_rows * kAnchorBlock);
  T* const s = weights.data();
  std::vector<int32_t> list;
  CountsAbove<T, kAnchorBlock> above(triplets != nullptr ? last_block - first_block : 0);
  PairScreen<T> screening(screen, plan, pass);

  for (int64_t next = split * plan.split_rows; next < end;) {
    const int64_t begin = next;
    next = tile.choose(sweep, p.bank_labels, p.bank_ids, begin, end, positives_only);
    if (tile.rows == 0) continue;
    screening.begin();
    load_tile(p, sweep, rewrite, begin, screening, part, tile);
    // The rows that come next, if they are those that follow.
    const int64_t ahead = positives_only ? 0 : std::min(plan.tile_rows, sweep.count - next);
    const int64_t steps = screening.is_on() ? screen_steps(tile.rows, padded) : Similarities<T>::steps(tile.rows, p.D);
    Prefetch prefetch(p.bank + next * p.D, ahead * p.D * static_cast<int64_t>(sizeof(S)), steps);
    for (int64_t block = first_block; block < last_block; ++block) {
      if (screening.add(tile, sweep, block, block - first_block, triplets, above, gradient, part, prefetch)) continue;
      if (in_chains)
        Similarities<T>::template compute<kPairChains>(tile, padded, p.D, sweep.anchors(block), prefetch, s);
      else
        Similarities<T>::template compute<1>(tile, padded, p.D, sweep.anchors(block), prefetch, s);
      // The second slot first: the weights of the first take the place of the similarities.
      for (int k = kSlots - 1; k >= 0; --k) {
        const Slot& slot = pass.slot[k];
        if (slot.pairs == Pairs::none) continue;
        T* weight = s + k * plan.tile_rows * kAnchorBlock;
        T* grad = gradient && !slot.only_sums ? part.grad(k, block - first_block) : nullptr;
        char& touched = part.touched(k, block - first_block);
        list.clear();
        Scorer<T, kAnchorBlock> scorer{.rows = tile.scored(),
                                       .slot = slot,
                                       .label = sweep.labels.label.data() + block * kAnchorBlock,
                                       .excluded = sweep.labels.excluded.data() + block * kAnchorBlock,
                                       .given = sweep.given.data() + block * kAnchorBlock,
                                       .s = s,
                                       .weight = weight,
                                       .sums = part.sums(k, block - first_block)};
        if (triplets != nullptr)
          TripletScorer<T, kAnchorBlock>{scorer, *triplets, block * kAnchorBlock, above.of(block - first_block), list}
              .add();
        else
          scorer.add(touched ? grad : nullptr, padded);
        if (grad == nullptr) continue;
        if (triplets == nullptr) scorer.list_weighted_rows(list);
        if (list.empty()) continue;
        if (!touched) std::fill(grad, grad + kAnchorBlock * padded, T(0));
        touched = 1;
        for (const int32_t j : list) scale_weights(weight + j * kAnchorBlock, tile.inverse_norm[j]);
        add_gradient(weight, tile.data, padded, list, grad);
      }
    }
  }
  if (triplets == nullptr || pass.slot[0].formula != Formula::rank) return;
  for (int64_t block = first_block; block < last_block; ++block)
    above.add_to(*triplets, block - first_block, block * kAnchorBlock, part.sums(0, block - first_block));
}

// Adds what splits further to the right contribute to the slots of a pass.
template <typename T>
void add_contribution(Contribution<T>& left, Contribution<T>& right, const Pass& pass) {
  const int64_t padded = left.padded;
  for (size_t k = 0; k < left.rewritten.size(); ++k) left.rewritten[k] += right.rewritten[k];
  for (int slot = 0; slot < kSlots; ++slot) {
    if (pass.slot[slot].pairs == Pairs::none) continue;
    const Formula formula = pass.slot[slot].formula;
    for (int64_t block = 0; block < left.blocks; ++block) {
      RowSums *sums = left.sums(slot, block), *more = right.sums(slot, block);
      char& touched = left.touched(slot, block);
      const bool had = touched != 0, has_more = right.touched(slot, block) != 0;
      touched = had || has_more;
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const double before = sums[i].shift;
        sums[i] = add(formula, sums[i], more[i]);
        if (!touched) continue;
        T* grad = left.grad(slot, block) + i * padded;
        const T* other = right.grad(slot, block) + i * padded;
        const T factor = static_cast<T>(rescale(before, sums[i].shift));
        const T of_other = static_cast<T>(rescale(more[i].shift, sums[i].shift));
        if (!has_more && factor == T(1)) continue;
#pragma omp simd
        for (int64_t d = 0; d < padded; ++d)
          grad[d] = (had ? factor * grad[d] : T(0)) + (has_more ? of_other * other[d] : T(0));
      }
    }
  }
}

// NaN for an anchor that is not finite, so that a gradient scaler, which looks at gradients only, sees it.
template <typename T, typename S>
bool begin_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, int64_t i) {
  T* out = p.grad_z + i * p.D;
  std::fill(out, out + p.D, sweep.finite[i] ? T(0) : std::numeric_limits<T>::quiet_NaN());
  return sweep.finite[i] && is_marked(p.anchors, i);
}

// grad_z of one anchor, which is number i of all and `place` of its group: its slots' sums times their factors.
template <typename T, typename S>
void reduce_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, Contribution<T>& all, const Total& total,
                     int64_t i, int64_t place) {
  if (!begin_gradient(p, sweep, i)) return;
  T* out = p.grad_z + i * p.D;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!all.touched(slot, place / kAnchorBlock)) continue;
    const T* grad = all.grad(slot, 0) + place * all.padded;
    const T factor = static_cast<T>(total.factor[slot]);
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] += factor * grad[d];
  }
}

// The same where an anchor's gradient is that of two extremes, hardest negative and positive.
template <typename T, typename S>
void gather_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, const Total& total, int64_t i) {
  if (!begin_gradient(p, sweep, i)) return;
  T* out = p.grad_z + i * p.D;
  Scratch<T> row(p.D);
  for (int slot = 0; slot < kSlots; ++slot) {
    if (total.factor[slot] == 0) continue;
    const T inverse = load_row(p, sweep, static_cast<int64_t>(total.sums.of[slot].value), row.data());
    const T factor = static_cast<T>(total.factor[slot]) * inverse;
    const T* r = row.data();
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] += factor * r[d];
  }
}

// What a part of a bank adds to a slot of one anchor, in place `place` of its group: the sum of weight * row, or the row
// of an extreme. Zeros without one, or if slot is negative.
template <typename T, typename S>
void slot_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, Contribution<T>& all, int slot,
                   const RowSums& sums, int64_t place, T* out) {
  std::fill(out, out + p.D, T(0));
  if (slot < 0) return;
  if (all.has_gradients()) {
    if (!all.touched(slot, place / kAnchorBlock)) return;
    std::copy_n(all.grad(slot, 0) + place * all.padded, p.D, out);
  } else if (sums.value >= 0) {
    const T inverse = load_row(p, sweep, static_cast<int64_t>(sums.value), out);
    for (int64_t d = 0; d < p.D; ++d) out[d] *= inverse;
  }
}
