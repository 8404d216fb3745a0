// Compiled once per instruction set: see for_each_isa.h. The two products are written with the compiler's
// vector types, blocked so that their accumulators fill the registers; pairs are scored in them, too; the rest are loops it
// vectorises.

#include "../pair_formulas.h"
#include "transform_kernel.h"

template <typename T>
struct VectorOf {
  // may_alias and the element's own alignment: loads from any T*.
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;  // the same as a value
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

// Of bank row j, what it is multiplied by as it counts.
template <typename T, typename S>
T inverse_norm(const MemoryLossParams<T, S>& p, T square) {
  if (!p.renormalize) return T(1);
  const T norm = std::sqrt(square);
  return T(1) / (norm < static_cast<T>(p.eps) ? static_cast<T>(p.eps) : norm);
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
  return inverse_norm(p, square);
}

// The same of a row that is used where it lies.
template <typename T>
T inverse_norm_of(const MemoryLossParams<T, T>& p, const T* r) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < p.D; ++d) square += r[d] * r[d];
  return inverse_norm(p, square);
}

// The tile's bank rows, each padded with zeros to whole vectors, and rows of zeros to a whole unit; or, where the bank has
// them just so, the bank's own.
template <typename T, typename S>
void load_tile(const MemoryLossParams<T, S>& p, const Sweep<T>& sweep, Tile<T>& tile) {
  const int64_t padded = sweep.plan.padded_dim, whole = round_up(tile.rows, kTileUnit);
  if constexpr (std::is_same_v<T, S>) {
    const int64_t first = tile.bank_row[0], last = tile.bank_row[tile.rows - 1];
    if (sweep.scale.empty() && padded == p.D && whole == tile.rows && last - first == tile.rows - 1) {
      tile.data = p.bank + first * p.D;
      for (int64_t j = 0; j < tile.rows; ++j) tile.inverse_norm[j] = inverse_norm_of(p, tile.data + j * p.D);
      return;
    }
  }
  T* const copy = tile.copy.data();
  for (int64_t j = 0; j < tile.rows; ++j) {
    T* r = copy + j * padded;
    tile.inverse_norm[j] = load_row(p, sweep, tile.bank_row[j], r);
    for (int64_t d = p.D; d < padded; ++d) r[d] = T(0);
  }
  std::fill(copy + tile.rows * padded, copy + whole * padded, T(0));
  std::fill(tile.inverse_norm.begin() + tile.rows, tile.inverse_norm.begin() + whole, T(0));
  tile.data = copy;
}

// Memory that is fetched into the second-level cache in as many steps as there is other work to do.
class Prefetch {
 public:
  Prefetch(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes), step_(round_up(ceil_div(bytes, steps), kLine)) {}
  void step() {
    for (const char* stop = std::min(next_ + step_, end_); next_ < stop; next_ += kLine)
      __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  const char* end_;
  int64_t step_;
};

// s[R][64], C vectors wide, += rows [R][.] times anchors [depth][64]; the last time, times the rows' factors [R].
template <int R, int C, typename T>
void similarity_kernel(const T* rows, int64_t stride, const T* anchors, int64_t depth, bool first, const T* factor,
                       T* s) {
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
    for (int c = 0; c < C; ++c)
      vector_at(s + r * kAnchorBlock + c * L) = factor != nullptr ? sum[r][c] * factor[r] : sum[r][c];
}

template <typename T>
struct Similarities {
  static constexpr int64_t kDepth = (32 << 10) / (kAnchorBlock * sizeof(T));  // 32 KiB of anchors at a time
  static constexpr int kWidth = kColumns * kLanes<T>;

  // How many steps of a prefetch compute() makes.
  static int64_t steps(int64_t rows, int64_t D) { return ceil_div(D, kDepth) * ceil_div(rows, kTileUnit); }

  // s[rows][64] = the tile's rows, normalised, times the anchors of a block [D][64].
  static void compute(const Tile<T>& tile, int64_t padded, int64_t D, const T* anchors, Prefetch& prefetch, T* s) {
    for (int64_t k = 0; k < D; k += kDepth)
      for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
        prefetch.step();
        const T* factor = k + kDepth >= D ? tile.inverse_norm.data() + j : nullptr;
        for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
          similarity_kernel<kTileUnit, kColumns>(tile.data + j * padded + k, padded, anchors + k * kAnchorBlock + i,
                                                 std::min(kDepth, D - k), k == 0, factor, s + j * kAnchorBlock + i);
      }
  }
};

// For each lane, of an anchor, -1 if its number is the given one, else 0.
template <typename T>
inline Truth<Lanes<T>> lanes_that_are(const int32_t* numbers, int32_t number) {
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    return vector_at(numbers) == number;
  } else {
    typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2), aligned(alignof(int32_t)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(numbers) == number, Truth<Lanes<T>>);
  }
}

// Which pairs of a bank row and a vector of anchors a slot takes, and which of them are positives. Most rows are negatives
// of all anchors: of those, not `mixed`, all of it is known when this is compiled.
template <typename T, bool mixed>
struct Mask {
  Truth<Lanes<T>> on = ~Truth<Lanes<T>>(), positive = Truth<Lanes<T>>();
};

// Scores a block of anchors against a tile: a slot's sums, and the weights of its pairs.
template <typename T>
struct Scorer {
  static constexpr int L = kLanes<T>;

  const Tile<T>& tile;
  const Slot& slot;
  const int32_t* anchor_group;    // [64]
  const int32_t* excluded_group;  // [64]
  const T* given;                 // [64]
  const T* s;                     // [rows][64]
  T* weight;                      // [rows][64], may be s
  RowSums* sums;                  // [64]
  std::vector<int32_t>& list;     // of the rows that have a pair with a weight

  Mask<T, true> mask_of(int64_t j, int64_t first) const {
    const Truth<Lanes<T>> positive = lanes_that_are<T>(anchor_group + first, tile.group[j]);
    const Truth<Lanes<T>> excluded = lanes_that_are<T>(excluded_group + first, tile.excluded[j]);
    const Truth<Lanes<T>> taken = slot.pairs == Pairs::all         ? ~Truth<Lanes<T>>()
                                  : slot.pairs == Pairs::positives ? positive
                                                                   : ~positive;
    return {taken & ~excluded, positive};
  }

  bool looks_at(int64_t j) const { return tile.mixed[j] || slot.pairs != Pairs::positives; }

  // Calls f(row, mask of the anchors from `first` on) for every row of the tile that the slot looks at.
  template <typename F>
  void each_row(int64_t first, const F& f) const {
    for (int64_t j = 0; j < tile.rows; ++j) {
      if (tile.mixed[j])
        f(j, mask_of(j, first));
      else if (looks_at(j))
        f(j, Mask<T, false>());
    }
  }

  // A vector of anchors goes through all rows, its sums in registers, then the next.
  template <typename Formula>
  void add_scores(const Formula& formula) {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kAnchorBlock; first += L) {
      Lanes<T> value = {}, weights = {}, pairs = {};
      const Lanes<T> given_lanes = vector_at(given + first);
      each_row(first, [&](int64_t j, const auto& mask) {
        const int64_t at = j * kAnchorBlock + first;
        const auto score = lanewise(formula, Lanes<T>(vector_at(s + at)), mask.positive, given_lanes);
        const Lanes<T> w = mask.on ? score.weight : zero;
        value += mask.on ? score.value : zero;
        if (Formula::kSumsWeights) weights += w;
        pairs += mask.on & score.counts ? one : zero;
        vector_at(weight + at) = w;
      });
      for (int64_t i = 0; i < L; ++i) {
        sums[first + i].value += static_cast<double>(value[i]);
        sums[first + i].weight += static_cast<double>(weights[i]);
        sums[first + i].pairs += static_cast<double>(pairs[i]);
      }
    }
    list_weighted_rows();
  }

  template <typename Formula, typename V>
  static Score<V> lanewise(const Formula& formula, V x, Truth<V> positive, V given_lanes) {
    return formula(x, positive, given_lanes);
  }

  // One lane after the other: its logarithm is no vector's. Only positives come here.
  template <typename V>
  static Score<V> lanewise(const NTXentFormula<T>& formula, V x, Truth<V>, V given_lanes) {
    Score<V> scores = {};
    for (int i = 0; i < L; ++i) {
      const Score<T> score = formula(x[i], true, given_lanes[i]);
      scores.value[i] = score.value;
      scores.weight[i] = score.weight;
      scores.counts[i] = -1;
    }
    return scores;
  }

  // Scales former sums, and a gradient that goes with them, to the largest exponent of this tile. grad may be null.
  template <typename Formula>
  void add_exponents(const Formula& formula, T* grad, int64_t padded) {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kAnchorBlock; first += L) {
      const Lanes<T> given_lanes = vector_at(given + first);
      Lanes<T> top, value = {}, pairs = {};
      for (int64_t i = 0; i < L; ++i) top[i] = static_cast<T>(sums[first + i].shift);
      each_row(first, [&](int64_t j, const auto& mask) {
        const auto e = formula(Lanes<T>(vector_at(s + j * kAnchorBlock + first)), mask.positive, given_lanes);
        top = mask.on & e.counts & (e.x > top) ? e.x : top;
      });
      for (int64_t i = 0; i < L; ++i) rescale_sums(first + i, top[i], grad, padded);
      each_row(first, [&](int64_t j, const auto& mask) {
        const int64_t at = j * kAnchorBlock + first;
        const auto e = formula(Lanes<T>(vector_at(s + at)), mask.positive, given_lanes);
        const Truth<Lanes<T>> counts = mask.on & e.counts;
        const Lanes<T> term = counts ? exp_of_negative(e.x - top) : zero;
        value += term;
        pairs += counts ? one : zero;
        vector_at(weight + at) = counts ? e.slope * term : zero;
      });
      for (int64_t i = 0; i < L; ++i) {
        sums[first + i].value += static_cast<double>(value[i]);
        sums[first + i].pairs += static_cast<double>(pairs[i]);
      }
    }
    list_weighted_rows();
  }

  void rescale_sums(int64_t i, T top, T* grad, int64_t padded) {
    const T before = static_cast<T>(sums[i].shift);
    if (!(top > before)) return;
    const T factor = std::exp(before - top);
    sums[i].value *= static_cast<double>(factor);
    sums[i].shift = static_cast<double>(top);
    if (grad == nullptr) return;
#pragma omp simd
    for (int64_t d = 0; d < padded; ++d) grad[i * padded + d] *= factor;
  }

  void add_extremes() {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kAnchorBlock; first += L) {
      Lanes<T> top, pairs = {};
      Truth<Lanes<T>> at = ~Truth<Lanes<T>>();  // rows of the tile, -1 for none
      for (int64_t i = 0; i < L; ++i) top[i] = static_cast<T>(sums[first + i].shift);
      each_row(first, [&](int64_t j, const auto& mask) {
        const Lanes<T> similarity = vector_at(s + j * kAnchorBlock + first);
        const Lanes<T> x = mask.positive ? -similarity : similarity;
        const Truth<Lanes<T>> farther = mask.on & exceeds(x, top);
        top = farther ? x : top;
        at = farther ? Truth<Lanes<T>>() + static_cast<Count<T>>(j) : at;
        pairs += mask.on ? one : zero;
      });
      for (int64_t i = 0; i < L; ++i) {
        RowSums& sum = sums[first + i];
        sum.pairs += static_cast<double>(pairs[i]);
        if (at[i] < 0) continue;
        sum.shift = static_cast<double>(top[i]);
        sum.value = static_cast<double>(tile.bank_row[at[i]]);
      }
    }
  }

  void list_weighted_rows() {
    for (int64_t j = 0; j < tile.rows; ++j) {
      if (!looks_at(j)) continue;
      Truth<Lanes<T>> any = {};
      for (int64_t i = 0; i < kAnchorBlock; i += L) any |= vector_at(weight + j * kAnchorBlock + i) != Lanes<T>();
      if (any_lane(any)) list.push_back(static_cast<int32_t>(j));
    }
  }

  static bool any_lane(Truth<Lanes<T>> truth) {
    Count<T> any = 0;
    for (int i = 0; i < L; ++i) any |= truth[i];
    return any != 0;
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

// weights [64] of a row, so that they are those of the row before it is normalised.
template <typename T>
void scale_weights(T* weights, T inverse_norm) {
  for (int64_t i = 0; i < kAnchorBlock; i += kLanes<T>) vector_at(weights + i) *= inverse_norm;
}

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

// The anchors of a group against the bank rows of a split. triplets and rewrite may be null.
template <typename T, typename S>
void sweep_unit(const MemoryLossParams<T, S>& p, Sweep<T>& sweep, Triplets<T>* triplets, Rewrite<S>* rewrite,
                const Pass& pass, int64_t group, int64_t split) {
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
    const int64_t begin = next;
    next = tile.choose(sweep, p.bank_labels, p.bank_ids, begin, end, positives_only);
    if (tile.rows == 0) continue;
    if constexpr (std::is_same_v<T, S>)
      if (rewrite != nullptr)
        transform_rows(rewrite->bank + begin * p.D, next - begin, p.D, rewrite->scale.data(), rewrite->shift.data(),
                       rewrite->sums(split), rewrite->sums(split) + p.D);
    load_tile(p, sweep, tile);
    // The rows that come next, if they are those that follow.
    const int64_t ahead = positives_only ? 0 : std::min(plan.tile_rows, sweep.count - next);
    Prefetch prefetch(p.bank + next * p.D, ahead * p.D * static_cast<int64_t>(sizeof(S)),
                      Similarities<T>::steps(tile.rows, p.D));
    for (int64_t block = first_block; block < last_block; ++block) {
      Similarities<T>::compute(tile, padded, p.D, sweep.anchors(block), prefetch, s);
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
        for (const int32_t j : list) scale_weights(weight + j * kAnchorBlock, tile.inverse_norm[j]);
        add_gradient(weight, tile.data, padded, list, grad);
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
    const T inverse = load_row(p, sweep, static_cast<int64_t>(total.sums[slot].value), row.data());
    const T factor = static_cast<T>(total.factor[slot]) * inverse;
    const T* r = row.data();
#pragma omp simd
    for (int64_t d = 0; d < p.D; ++d) out[d] += factor * r[d];
  }
}
