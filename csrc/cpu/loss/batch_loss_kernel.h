// Compiled once per instruction set: see for_each_isa.h. What one anchor's pairs with its batch cost and weigh, a vector of
// pairs at a time.

#include "../../math/pair_formulas.h"
#include "vectors_kernel.h"

// Scores the pairs of an anchor, vector by vector.
template <typename T>
struct RowScorer {
  using V = Lanes<T>;
  using Mask = Truth<V>;
  static constexpr int64_t L = kLanes<T>;

  BatchRow<T>& row;

  void load(const BatchLossParams<T>& p, const T* inverse_norm, int64_t i) {
    const T* dots = p.dots + i * p.B;
    const int64_t label = p.labels[i], id = p.ids != nullptr ? p.ids[i] : -1;
    T* s = row.s.data();
    Count<T>*positive = row.positive.data(), *pair = row.pair.data();
    row.finite = T(0) * dots[i] == T(0);
    const T nan = row.finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
#pragma omp simd
    for (int64_t j = 0; j < p.B; ++j) {
      s[j] = dots[j] * inverse_norm[j] + nan;
      positive[j] = p.labels[j] == label ? -1 : 0;
      pair[j] = -1;
    }
    for (int64_t j = 0; id >= 0 && j < p.B; ++j)
      if (p.ids[j] == id) pair[j] = 0;
    pair[i] = 0;
  }

  // A vector of the masks of the pairs that a slot takes.
  Mask mask(Pairs pairs, int64_t j) const {
    const Mask all = load_lanes(row.pair.data() + j), positives = load_lanes(row.positive.data() + j);
    return pairs == Pairs::all ? all : pairs == Pairs::positives ? all & positives : all & ~positives;
  }

  // f(first pair, similarities, which of them are positive, which of them the slot takes)
  template <typename F>
  void each_vector(Pairs pairs, const F& f) const {
    for (int64_t j = 0; j < row.n; j += L)
      f(j, load_lanes(row.s.data() + j), load_lanes(row.positive.data() + j), mask(pairs, j));
  }

  // Fills row.weight[k] and returns the sums of slot k.
  RowSums score(const Slot& slot, int k, T given) {
    const T a = static_cast<T>(slot.a), b = static_cast<T>(slot.b);
    T* weights = row.weight[k].data();
    row.pairs[k] = slot.pairs;
    switch (slot.formula) {
      case Formula::margin: return add_scores(MarginFormula<T>{a, b}, slot.pairs, weights, given);
      case Formula::similarity: return add_scores(SimilarityFormula<T>{a}, slot.pairs, weights, given);
      case Formula::ntxent: return add_scores(NTXentFormula<T>{a}, slot.pairs, weights, given);
      case Formula::exponent: return add_exponents(ExponentFormula<T>{a, b, slot.mined}, slot, weights, given);
      case Formula::circle: return add_exponents(CircleFormula<T>{a, b}, slot, weights, given);
      case Formula::extreme: return find_extreme(slot.pairs, weights);
      case Formula::threshold:
      case Formula::rank:
      case Formula::weigh: break;  // rank_triplets()
    }
    return {};
  }

  template <typename Formula>
  RowSums add_scores(const Formula& formula, Pairs pairs, T* weights, T given) const {
    const V zero = {}, one = zero + T(1);
    V value = {}, sum = {}, counted = {};
    each_vector(pairs, [&](int64_t j, V x, Mask positives, Mask on) {
      const Score<V> score = lanewise(formula, x, positives, on, zero + given);
      const V w = on ? score.weight : zero;
      value += on ? score.value : zero;
      sum += w;
      counted += (on & score.counts) ? one : zero;
      store_lanes(weights + j, w);
    });
    return {total(value), total(sum), total(counted), 0};
  }

  template <typename Formula>
  static Score<V> lanewise(const Formula& formula, V x, Mask positives, Mask, V given) {
    return formula(x, positives, given);
  }

  // One lane after the other: there is no vector logarithm here. Few pairs are positive.
  static Score<V> lanewise(const NTXentFormula<T>& formula, V x, Mask, Mask on, V given) {
    Score<V> scores = {};
    for (int lane = 0; lane < L; ++lane) {
      if (on[lane] == 0) continue;
      const Score<T> score = formula(x[lane], true, given[lane]);
      scores.value[lane] = score.value;
      scores.weight[lane] = score.weight;
      scores.counts[lane] = -1;
    }
    return scores;
  }

  template <typename Formula>
  RowSums add_exponents(const Formula& formula, const Slot& slot, T* weights, T given) const {
    const V zero = {}, one = zero + T(1);
    V largest = zero - std::numeric_limits<T>::infinity();
    each_vector(slot.pairs, [&](int64_t, V x, Mask positives, Mask on) {
      const Exponent<V> e = formula(x, positives, zero + given);
      largest = (on & e.counts & (e.x > largest)) ? e.x : largest;
    });
    T top = largest[0];
    for (int lane = 1; lane < L; ++lane) top = std::max(top, largest[lane]);
    V value = {}, counted = {};
    each_vector(slot.pairs, [&](int64_t j, V x, Mask positives, Mask on) {
      const Exponent<V> e = formula(x, positives, zero + given);
      const Mask counts = on & e.counts;
      const V term = counts ? exp_of_negative(e.x - top) : zero;
      value += term;
      counted += counts ? one : zero;
      store_lanes(weights + j, counts ? e.slope * term : zero);
    });
    return {total(value), 0, total(counted), static_cast<double>(top)};
  }

  RowSums find_extreme(Pairs pairs, T* weights) const {
    RowSums sums = no_sums(Formula::extreme);
    std::fill_n(weights, row.n, T(0));
    each_vector(pairs, [&](int64_t j, V x, Mask positives, Mask on) {
      for (int lane = 0; lane < L; ++lane) {
        if (on[lane] == 0) continue;
        const T distance = positives[lane] != 0 ? -x[lane] : x[lane];
        sums.pairs += 1;
        if (!exceeds(distance, static_cast<T>(sums.shift))) continue;
        sums.shift = static_cast<double>(distance);
        sums.value = static_cast<double>(j + lane);
      }
    });
    if (sums.value >= 0) weights[static_cast<int64_t>(sums.value)] = 1;
    return sums;
  }

  // All triplets: see ranks.h. Sums over the negatives; weights of both.
  RowSums rank_triplets(T margin) {
    row.pairs[0] = Pairs::negatives, row.pairs[1] = Pairs::positives;
    T *negatives = row.weight[0].data(), *positives = row.weight[1].data(), *thresholds = row.thresholds.data();
    double* below = row.below.data();
    int64_t *above = row.above.data(), m = 0;
    std::fill_n(negatives, row.n, T(0));
    std::fill_n(positives, row.n, T(0));
    each(Pairs::positives, [&](int64_t j) { thresholds[m++] = row.s[j]; });
    std::sort(thresholds, thresholds + m, [](T x, T y) { return sorts_before(x, y); });
    below[0] = 0;
    for (int64_t r = 0; r < m; ++r) below[r + 1] = below[r] + static_cast<double>(thresholds[r]);
    std::fill_n(above, m + 1, 0);
    RowSums sums = {};
    each(Pairs::negatives, [&](int64_t j) {
      const T x = row.s[j] + margin;
      const int64_t rank = rank_among(thresholds, m, x);
      if (rank == 0) return;
      sums.value += static_cast<double>(rank) * static_cast<double>(x) - below[rank];
      sums.pairs += static_cast<double>(rank);
      negatives[j] = static_cast<T>(rank);
      above[rank - 1] += 1;
    });
    for (int64_t r = m - 1; r > 0; --r) above[r - 1] += above[r];
    each(Pairs::positives,
         [&](int64_t j) { positives[j] = static_cast<T>(above[place_among(thresholds, m, row.s[j])]); });
    return sums;
  }

  // row.grad += factor times the weights of the pairs of slot k. If a similarity is NaN, so is the factor.
  void add_gradient(int k, T factor) {
    const V zero = {};
    const T* weights = row.weight[k].data();
    each_vector(row.pairs[k], [&](int64_t j, V, Mask, Mask on) {
      T* const grad = row.grad.data() + j;
      store_lanes(grad, load_lanes(grad) + (on ? factor * load_lanes(weights + j) : zero));
    });
  }

  // f(pair) for those that a slot takes.
  template <typename F>
  void each(Pairs pairs, const F& f) const {
    each_vector(pairs, [&](int64_t j, V, Mask, Mask on) {
      for (int lane = 0; lane < L; ++lane)
        if (on[lane] != 0) f(j + lane);
    });
  }

  static double total(V lanes) {
    double sum = 0;
    for (int lane = 0; lane < L; ++lane) sum += static_cast<double>(lanes[lane]);
    return sum;
  }
};

// Anchors [begin, end): what each adds to the loss, and the derivative of that by its similarities, up to what sums are
// multiplied by in the end.
template <typename T>
void rank_rows(const BatchLossParams<T>& p, const LossSpec& loss, const T* inverse_norm, int64_t begin, int64_t end,
               BatchRow<T>& row, RowResult* results) {
  const Program program = make_program(loss);
  RowScorer<T> scorer{row};
  for (int64_t i = begin; i < end; ++i) {
    T* grad = p.grad_dots != nullptr ? p.grad_dots + i * p.B : nullptr;
    const bool ranks = p.anchors == nullptr || p.anchors[i];
    scorer.load(p, inverse_norm, i);
    if (grad != nullptr && !(ranks && row.finite))
      std::fill_n(grad, p.B, row.finite ? T(0) : std::numeric_limits<T>::quiet_NaN());
    if (!ranks) continue;
    RowSums sums[kSlots] = {};
    if (loss.kind == LossKind::triplet_all) {
      sums[0] = scorer.rank_triplets(static_cast<T>(loss.a));
    } else {
      T given = 0;
      for (int k = 0; k < program.passes; ++k) {
        if (k > 0) given = static_cast<T>(given_for(loss, k, sums));
        for (int slot = 0; slot < kSlots; ++slot)
          if (program.pass[k].slot[slot].pairs != Pairs::none)
            sums[slot] = scorer.score(program.pass[k].slot[slot], slot, given);
      }
    }
    results[i] = finish(loss, sums);
    if (grad == nullptr || !row.finite) continue;
    std::fill_n(row.grad.data(), row.n, T(0));
    for (int k = 0; k < slots_of(loss); ++k) scorer.add_gradient(k, static_cast<T>(results[i].factor[k]));
    std::copy_n(row.grad.data(), p.B, grad);
  }
}

// Columns [begin, end) of grad_dots, from the derivatives by the similarities.
template <typename T>
void settle_columns(const BatchLossParams<T>& p, const T* norm, const T* inverse_norm, T of_negatives, T of_positives,
                    int64_t begin, int64_t end) {
  T sum[kStripe] = {};
  for (int64_t i = 0; i < p.B; ++i) {
    const T* dots = p.dots + i * p.B + begin;
    T* grad = p.grad_dots + i * p.B + begin;
    const int64_t label = p.labels[i];
#pragma omp simd
    for (int64_t j = 0; j < end - begin; ++j) {
      const T g = grad[j] * (p.labels[begin + j] == label ? of_positives : of_negatives);
      sum[j] += g * dots[j];
      grad[j] = g * inverse_norm[begin + j];
    }
  }
  for (int64_t j = begin; p.renormalize && j < end; ++j)
    if (!(norm[j] < static_cast<T>(p.eps)))
      p.grad_dots[j * p.B + j] = T(-0.5) * inverse_norm[j] * inverse_norm[j] * inverse_norm[j] * sum[j - begin];
}
