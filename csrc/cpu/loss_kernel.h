// Compiled once per instruction set: see for_each_isa.h. The two products are written with the compiler's
// vector types, blocked so that their accumulators fill the registers; the rest are loops it vectorises.

template <typename T>
struct VectorOf {
  // may_alias and the element's own alignment: loads from any T*.
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T>& vector_at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <typename T>
inline const Vector<T>& vector_at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// Accumulators take R x C registers, C more hold operands: 6 x 4 + 4 of 32, 6 x 2 + 2 of 16.
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 2;

template <typename T, typename S>
void pack_anchors(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, int64_t block) {
  T* packed = sweep.anchors(block);
  const int64_t rows = std::min(kAnchorBlock, p.B - block * kAnchorBlock);
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    const T* z = p.z + (block * kAnchorBlock + i) * p.D;
    T zero = 0;  // stays 0 as long as every value is finite, else becomes NaN
    for (int64_t d = 0; d < p.D; ++d) zero += i < rows ? T(0) * z[d] : T(0);
    sweep.finite[block * kAnchorBlock + i] = zero == T(0);
    for (int64_t d = 0; d < p.D; ++d) packed[d * kAnchorBlock + i] = (i < rows ? z[d] : T(0)) + zero;
  }
}

// Bank row j as it counts: converted, mapped, normalised.
template <typename T, typename S>
void load_row(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, int64_t j, T* r) {
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
  if (!p.renormalize) return;
  const T norm = std::sqrt(square);
  const T inverse = T(1) / (norm < static_cast<T>(p.eps) ? static_cast<T>(p.eps) : norm);
#pragma omp simd
  for (int64_t d = 0; d < p.D; ++d) r[d] *= inverse;
}

// The tile's bank rows, each padded with zeros to whole vectors, and rows of zeros to a whole unit.
template <typename T, typename S>
void load_tile(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, Tile<T>& tile) {
  const int64_t padded = sweep.plan.padded_dim, whole = round_up(tile.rows, kTileUnit);
  for (int64_t j = 0; j < tile.rows; ++j) {
    T* r = tile.data.data() + j * padded;
    load_row(p, sweep, tile.bank_row[j], r);
    for (int64_t d = p.D; d < padded; ++d) r[d] = T(0);
  }
  std::fill(tile.data.data() + tile.rows * padded, tile.data.data() + whole * padded, T(0));
}

// s[R][64], C vectors wide, += rows [R][.] times anchors [depth][64].
template <int R, int C, typename T>
void similarity_kernel(const T* rows, int64_t stride, const T* anchors, int64_t depth, bool first, T* s) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = first ? Vector<T>{} : vector_at(s + r * kAnchorBlock + c * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> z[C];
    for (int c = 0; c < C; ++c) z[c] = vector_at(anchors + k * kAnchorBlock + c * L);
    for (int r = 0; r < R; ++r) {
      const T u = rows[r * stride + k];
      for (int c = 0; c < C; ++c) sum[r][c] += z[c] * u;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) vector_at(s + r * kAnchorBlock + c * L) = sum[r][c];
}

// s[rows][64] = tile [rows][D] times the anchors of a block [D][64].
template <typename T>
void similarities(const T* tile, int64_t rows, int64_t padded, int64_t D, const T* anchors, T* s) {
  constexpr int64_t kDepth = (32 << 10) / (kAnchorBlock * sizeof(T));  // 32 KiB of anchors at a time
  constexpr int kWidth = kColumns * kLanes<T>;
  for (int64_t k = 0; k < D; k += kDepth)
    for (int64_t j = 0; j < rows; j += kTileUnit)
      for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
        similarity_kernel<kTileUnit, kColumns>(tile + j * padded + k, padded, anchors + k * kAnchorBlock + i,
                                               std::min(kDepth, D - k), k == 0, s + j * kAnchorBlock + i);
}

// Scores a block of anchors against a tile: a slot's sums, and the weights of its pairs.
template <typename T>
struct Scorer {
  const Tile<T>& tile;
  const Slot& slot;
  const int32_t* anchor_group;    // [64]
  const int32_t* excluded_group;  // [64]
  const T* given;                 // [64]
  const T* s;                     // [rows][64]
  T* weight;                      // [rows][64], may be s
  RowSums* sums;                  // [64]
  std::vector<int32_t>& list;     // of the rows that have a pair with a weight

  // Which anchors a row is paired with in this slot, and which have its label.
  struct Mask {
    int32_t on[kAnchorBlock], positive[kAnchorBlock];
  };

  // Calls f(row, whether it is mixed, its mask if so) for every row of the tile that the slot looks at. Most rows are
  // negatives of all anchors: for those f is compiled apart, without a mask.
  template <typename F>
  void each_row(const F& f) const {
    const bool all = slot.pairs == Pairs::all, wanted = slot.pairs == Pairs::positives;
    Mask mask;
    for (int64_t j = 0; j < tile.rows; ++j) {
      if (!tile.mixed[j]) {
        if (!wanted) f(j, std::false_type{}, mask);
        continue;
      }
      const int32_t group = tile.group[j], excluded = tile.excluded[j];
#pragma omp simd
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        mask.positive[i] = anchor_group[i] == group;
        mask.on[i] = (excluded_group[i] != excluded) & (all | ((anchor_group[i] == group) == wanted));
      }
      f(j, std::true_type{}, mask);
    }
  }

  template <typename Formula>
  void add_scores(const Formula& formula) {
    T value[kAnchorBlock] = {}, weights[kAnchorBlock] = {}, pairs[kAnchorBlock] = {};
    each_row([&](int64_t j, auto mixed, const Mask& mask) {
      const T* row = s + j * kAnchorBlock;
      T* out = weight + j * kAnchorBlock;
      int any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const bool on = !mixed || mask.on[i];
        const Score<T> score = formula(row[i], mixed && mask.positive[i], given[i]);
        const T w = on ? score.weight : T(0);
        value[i] += on ? score.value : T(0);
        if (Formula::kSumsWeights) weights[i] += w;
        pairs[i] += on && score.counts ? T(1) : T(0);
        out[i] = w;
        any |= w != T(0);
      }
      if (any) list.push_back(static_cast<int32_t>(j));
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      sums[i].value += static_cast<double>(value[i]);
      sums[i].weight += static_cast<double>(weights[i]);
      sums[i].pairs += static_cast<double>(pairs[i]);
    }
  }

  // Scales former sums, and a gradient that goes with them, to the largest exponent of this tile. grad may be null.
  template <typename Formula>
  void add_exponents(const Formula& formula, T* grad, int64_t padded) {
    T before[kAnchorBlock], top[kAnchorBlock], value[kAnchorBlock] = {}, pairs[kAnchorBlock] = {};
    for (int64_t i = 0; i < kAnchorBlock; ++i) before[i] = top[i] = static_cast<T>(sums[i].shift);
    each_row([&](int64_t j, auto mixed, const Mask& mask) {
      const T* row = s + j * kAnchorBlock;
#pragma omp simd
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const Exponent<T> e = formula(row[i], mixed && mask.positive[i], given[i]);
        const bool counts = (!mixed || mask.on[i]) && e.counts;
        top[i] = counts && e.x > top[i] ? e.x : top[i];
      }
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      if (!(top[i] > before[i])) continue;
      const T factor = std::exp(before[i] - top[i]);
      sums[i].value *= static_cast<double>(factor);
      sums[i].shift = static_cast<double>(top[i]);
      if (grad == nullptr) continue;
#pragma omp simd
      for (int64_t d = 0; d < padded; ++d) grad[i * padded + d] *= factor;
    }
    each_row([&](int64_t j, auto mixed, const Mask& mask) {
      const T* row = s + j * kAnchorBlock;
      T* out = weight + j * kAnchorBlock;
      int any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const Exponent<T> e = formula(row[i], mixed && mask.positive[i], given[i]);
        const bool counts = (!mixed || mask.on[i]) && e.counts;
        const T term = counts ? exp_of_negative(e.x - top[i]) : T(0);
        value[i] += term;
        pairs[i] += counts ? T(1) : T(0);
        const T w = e.slope * term;
        out[i] = counts ? w : T(0);
        any |= counts && w != T(0);
      }
      if (any) list.push_back(static_cast<int32_t>(j));
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      sums[i].value += static_cast<double>(value[i]);
      sums[i].pairs += static_cast<double>(pairs[i]);
    }
  }

  void add_extremes() {
    T top[kAnchorBlock], pairs[kAnchorBlock] = {};
    int32_t at[kAnchorBlock];
    for (int64_t i = 0; i < kAnchorBlock; ++i) top[i] = static_cast<T>(sums[i].shift), at[i] = -1;
    each_row([&](int64_t j, auto mixed, const Mask& mask) {
      const T* row = s + j * kAnchorBlock;
#pragma omp simd
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const bool on = !mixed || mask.on[i];
        const T x = mixed && mask.positive[i] ? -row[i] : row[i];
        const bool farther = on && exceeds(x, top[i]);
        top[i] = farther ? x : top[i];
        at[i] = farther ? static_cast<int32_t>(j) : at[i];
        pairs[i] += on ? T(1) : T(0);
      }
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      sums[i].pairs += static_cast<double>(pairs[i]);
      if (at[i] < 0) continue;
      sums[i].shift = static_cast<double>(top[i]);
      sums[i].value = static_cast<double>(tile.bank_row[at[i]]);
    }
  }

  void add(T* grad, int64_t padded) {
    const T a = static_cast<T>(slot.a), b = static_cast<T>(slot.b);
    switch (slot.formula) {
      case Formula::margin: return add_scores(MarginFormula<T>{a, b});
      case Formula::similarity: return add_scores(SimilarityFormula<T>{a});
      case Formula::ntxent: return add_scores(NTXentFormula<T>{a});
      case Formula::exponent: return add_exponents(ExponentFormula<T>{a, b, slot.mined}, grad, padded);
      case Formula::circle: return add_exponents(CircleFormula<T>{a, b}, grad, padded);
      case Formula::extreme: return add_extremes();
      case Formula::threshold:
      case Formula::rank:
      case Formula::weigh: return;  // TripletScorer's
    }
  }
};

#include "triplets_kernel.h"

// grad[R][.], C vectors wide, += weights [.][64] transposed times the listed rows of the tile.
template <int R, int C, typename T>
void gradient_kernel(const T* weights, const T* tile, int64_t padded, const int32_t* list, int64_t n, T* grad) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = vector_at(grad + r * padded + c * L);
  for (int64_t k = 0; k < n; ++k) {
    const T* row = tile + list[k] * padded;
    const T* w = weights + list[k] * kAnchorBlock;
    Vector<T> u[C];
    for (int c = 0; c < C; ++c) u[c] = vector_at(row + c * L);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += u[c] * w[r];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) vector_at(grad + r * padded + c * L) = sum[r][c];
}

template <int C, typename T>
void gradient_columns(const T* weights, const T* tile, int64_t padded, const std::vector<int32_t>& list, T* grad) {
  constexpr int R = 6;
  const int64_t n = static_cast<int64_t>(list.size());
  int64_t i = 0;
  for (; i + R <= kAnchorBlock; i += R)
    gradient_kernel<R, C>(weights + i, tile, padded, list.data(), n, grad + i * padded);
  constexpr int kRest = kAnchorBlock % R;
  gradient_kernel<kRest, C>(weights + i, tile, padded, list.data(), n, grad + i * padded);
}

// grad [64][padded] += weights [rows][64] transposed times tile [rows][padded], over the listed rows.
template <typename T>
void add_gradient(const T* weights, const T* tile, int64_t padded, const std::vector<int32_t>& list, T* grad) {
  constexpr int L = kLanes<T>;
  int64_t d = 0;
  for (; d + kColumns * L <= padded; d += kColumns * L)
    gradient_columns<kColumns>(weights, tile + d, padded, list, grad + d);
  for (; d < padded; d += L) gradient_columns<1>(weights, tile + d, padded, list, grad + d);
}

// The anchors of a group against the bank rows of a split. triplets may be null.
template <typename T, typename S>
void sweep_unit(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, Triplets<T>* triplets, const Pass& pass,
                int64_t group, int64_t split) {
  const SweepPlan& plan = sweep.plan;
  const int64_t first_block = group * plan.group_blocks;
  const int64_t last_block = std::min(first_block + plan.group_blocks, plan.blocks);
  const int64_t end = std::min((split + 1) * plan.split_rows, sweep.count), padded = plan.padded_dim;
  const bool positives_only = pass.slot[0].pairs == Pairs::none;
  const bool gradient = pass.gradient && p.grad_z != nullptr;

  Tile<T> tile(plan);
  Workspace<T> weights(kSlots * plan.tile_rows * kAnchorBlock);
  T* const s = weights.data();
  std::vector<int32_t> list;
  CountsAbove<T> above(triplets != nullptr ? last_block - first_block : 0);

  for (int64_t next = split * plan.split_rows; next < end;) {
    next = tile.choose(sweep, p.bank_labels, p.bank_ids, next, end, positives_only);
    if (tile.rows == 0) continue;
    load_tile(p, sweep, tile);
    for (int64_t block = first_block; block < last_block; ++block) {
      similarities(tile.data.data(), round_up(tile.rows, kTileUnit), padded, p.D, sweep.anchors(block), s);
      // The second slot first: the weights of the first take the place of the similarities.
      for (int k = kSlots - 1; k >= 0; --k) {
        const Slot& slot = pass.slot[k];
        if (slot.pairs == Pairs::none) continue;
        T* weight = s + k * plan.tile_rows * kAnchorBlock;
        T* grad = gradient ? sweep.grad(split, k, block) : nullptr;
        char& touched = sweep.touched(split, k, block);
        list.clear();
        Scorer<T> scorer{tile,
                         slot,
                         sweep.anchor_group.data() + block * kAnchorBlock,
                         sweep.excluded_group.data() + block * kAnchorBlock,
                         sweep.given.data() + block * kAnchorBlock,
                         s,
                         weight,
                         sweep.sums(split, k, block),
                         list};
        if (triplets != nullptr)
          TripletScorer<T>{scorer, *triplets, block * kAnchorBlock, above.of(block - first_block)}.add();
        else
          scorer.add(touched ? grad : nullptr, padded);
        if (!gradient || list.empty()) continue;
        if (!touched) std::fill(grad, grad + kAnchorBlock * padded, T(0));
        touched = 1;
        add_gradient(weight, tile.data.data(), padded, list, grad);
      }
    }
  }
  if (triplets == nullptr || pass.slot[0].formula != Formula::rank) return;
  for (int64_t block = first_block; block < last_block; ++block)
    above.add_to(*triplets, block - first_block, block * kAnchorBlock, sweep.sums(split, 0, block));
}

// NaN for an anchor that is not finite, so that whoever looks at gradients only, as a gradient scaler does, sees it.
template <typename T, typename S>
bool begin_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, int64_t i) {
  T* out = p.grad_z + i * p.D;
  std::fill(out, out + p.D, sweep.finite[i] ? T(0) : std::numeric_limits<T>::quiet_NaN());
  return sweep.finite[i] && (p.anchors == nullptr || p.anchors[i]);
}

// grad_z of one anchor: the splits of each slot, in order, times the slot's factor.
template <typename T, typename S>
void reduce_gradient(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, const Total& total, int64_t i) {
  if (!begin_gradient(p, sweep, i)) return;
  T* out = p.grad_z + i * p.D;
  const int64_t block = i / kAnchorBlock, row = i % kAnchorBlock;
  for (int slot = 0; slot < kSlots; ++slot)
    for (int64_t split = 0; split < sweep.plan.splits; ++split) {
      if (!sweep.touched(split, slot, block)) continue;
      const T* grad = sweep.grad(split, slot, block) + row * sweep.plan.padded_dim;
      const double shift = sweep.sums(split, slot, block)[row].shift;
      const T factor = static_cast<T>(total.factor[slot] * rescale(shift, total.sums[slot].shift));
#pragma omp simd
      for (int64_t d = 0; d < p.D; ++d) out[d] += factor * grad[d];
    }
}

// The same where an anchor's gradient is that of two extremes, hardest negative and positive.
template <typename T, typename S>
void gather_gradient(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, const Total& total, int64_t i) {
  if (!begin_gradient(p, sweep, i)) return;
  T* out = p.grad_z + i * p.D;
  Workspace<T> row(p.D);
  for (int slot = 0; slot < kSlots; ++slot) {
    if (total.factor[slot] == 0) continue;
    load_row(p, sweep, static_cast<int64_t>(total.sums[slot].value), row.data());
    const T factor = static_cast<T>(total.factor[slot]);
    const T* r = row.data();
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] += factor * r[d];
  }
}
