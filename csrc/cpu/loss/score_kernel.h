// Compiled once per instruction set: see for_each_isa.h. What the pairs of some rows and a block of anchors cost and
// weigh, a vector of anchors at a time. The rows are the memory's or the batch's own. Of single pairs
// pair_scores_kernel.h does it, to the same bits.

// For each lane, of an anchor, -1 if its number is the given one, else 0.
template <typename T>
inline Truth<Lanes<T>> lanes_that_are(const int32_t* numbers, int32_t number) {
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    return load_lanes(numbers) == number;
  } else {
    typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    Narrow narrow;
    __builtin_memcpy(&narrow, numbers, sizeof(narrow));
    return __builtin_convertvector(narrow == number, Truth<Lanes<T>>);
  }
}

// Which pairs of a row and a vector of anchors a slot takes, and which of them are positives. Most rows are negatives
// of all anchors: for those, not `mixed`, all of it is known at compile time.
template <typename T, bool mixed>
struct Mask {
  Truth<Lanes<T>> on = ~Truth<Lanes<T>>(), positive = Truth<Lanes<T>>();
};

// Scales the sums of an anchor's exponents, and row i of a gradient that goes with them, to a largest exponent. grad may
// be null.
template <typename T>
void rescale_sums(RowSums& sums, T top, T* grad, int64_t i, int64_t padded) {
  const T before = static_cast<T>(sums.shift);
  if (!(top > before)) return;
  const T factor = std::exp(before - top);
  sums.value *= static_cast<double>(factor);
  sums.shift = static_cast<double>(top);
  if (grad == nullptr) return;
#pragma omp simd
  for (int64_t d = 0; d < padded; ++d) grad[i * padded + d] *= factor;
}

// Scores kBlock anchors against some rows: a slot's sums, and the weights of its pairs.
template <typename T, int64_t kBlock>
struct Scorer {
  static constexpr int L = kLanes<T>;

  ScoredRows rows;
  const Slot& slot;
  const int32_t* label;     // [block] of the anchors, see AnchorLabels
  const int32_t* excluded;  // [block]
  const T* given;           // [block]
  const T* s;               // [rows][block]
  T* weight;                // [rows][block], may be s
  RowSums* sums;            // [block]

  Mask<T, true> mask_of(int64_t j, int64_t first) const {
    const Truth<Lanes<T>> positive = lanes_that_are<T>(label + first, rows.label[j]);
    const Truth<Lanes<T>> apart = lanes_that_are<T>(excluded + first, rows.excluded[j]);
    const Truth<Lanes<T>> taken = slot.pairs == Pairs::all         ? ~Truth<Lanes<T>>()
                                  : slot.pairs == Pairs::positives ? positive
                                                                   : ~positive;
    return {taken & ~apart, positive};
  }

  bool looks_at(int64_t j) const { return rows.mixed[j] || slot.pairs != Pairs::positives; }

  // Calls f(row, mask of the anchors from `first` on) for every row that the slot looks at.
  template <typename F>
  void each_row(int64_t first, const F& f) const {
    for (int64_t j = 0; j < rows.size; ++j) {
      if (rows.mixed[j])
        f(j, mask_of(j, first));
      else if (looks_at(j))
        f(j, Mask<T, false>());
    }
  }

  // A vector of anchors meets all rows, its sums in registers, then the next.
  template <typename F>
  void add_scores(const F& formula) {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kBlock; first += L) {
      Lanes<T> value = {}, weights = {}, pairs = {};
      const Lanes<T> given_lanes = load_lanes(given + first);
      each_row(first, [&](int64_t j, const auto& mask) {
        const int64_t at = j * kBlock + first;
        const auto score = formula(load_lanes(s + at), mask.positive, given_lanes);
        const Lanes<T> w = mask.on ? score.weight : zero;
        value += mask.on ? score.value : zero;
        if (F::kSumsWeights) weights += w;
        pairs += (mask.on & score.counts) ? one : zero;
        store_lanes(weight + at, w);
      });
      for (int64_t i = 0; i < L; ++i) {
        sums[first + i].value += static_cast<double>(value[i]);
        sums[first + i].weight += static_cast<double>(weights[i]);
        sums[first + i].pairs += static_cast<double>(pairs[i]);
      }
    }
  }

  // Scales former sums, and a gradient that goes with them, to the largest exponent of these rows. grad may be null.
  template <typename F>
  void add_exponents(const F& formula, T* grad, int64_t padded) {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kBlock; first += L) {
      const Lanes<T> given_lanes = load_lanes(given + first);
      Lanes<T> top, value = {}, pairs = {};
      for (int64_t i = 0; i < L; ++i) top[i] = static_cast<T>(sums[first + i].shift);
      each_row(first, [&](int64_t j, const auto& mask) {
        const auto e = formula(load_lanes(s + j * kBlock + first), mask.positive, given_lanes);
        top = (mask.on & e.counts & (e.x > top)) ? e.x : top;
      });
      for (int64_t i = 0; i < L; ++i) rescale_sums(sums[first + i], top[i], grad, first + i, padded);
      each_row(first, [&](int64_t j, const auto& mask) {
        const int64_t at = j * kBlock + first;
        const auto e = formula(load_lanes(s + at), mask.positive, given_lanes);
        const Truth<Lanes<T>> counts = mask.on & e.counts;
        const Lanes<T> term = counts ? exp_of_negative(e.x - top) : zero;
        value += term;
        pairs += counts ? one : zero;
        store_lanes(weight + at, counts ? e.slope * term : zero);
      });
      for (int64_t i = 0; i < L; ++i) {
        sums[first + i].value += static_cast<double>(value[i]);
        sums[first + i].pairs += static_cast<double>(pairs[i]);
      }
    }
  }

  void add_extremes() {
    const Lanes<T> zero = {}, one = zero + T(1);
    for (int64_t first = 0; first < kBlock; first += L) {
      Lanes<T> top, pairs = {};
      Truth<Lanes<T>> at = ~Truth<Lanes<T>>();  // rows, -1 for none
      for (int64_t i = 0; i < L; ++i) top[i] = static_cast<T>(sums[first + i].shift);
      each_row(first, [&](int64_t j, const auto& mask) {
        const Lanes<T> similarity = load_lanes(s + j * kBlock + first);
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
        sum.value = static_cast<double>(rows.number[at[i]]);
      }
    }
  }

  // Adds those that have a pair with a weight.
  void list_weighted_rows(std::vector<int32_t>& list) const {
    for (int64_t j = 0; j < rows.size; ++j) {
      if (!looks_at(j)) continue;
      Truth<Lanes<T>> any = {};
      for (int64_t i = 0; i < kBlock; i += L) any |= load_lanes(weight + j * kBlock + i) != Lanes<T>();
      if (any_lane(any)) list.push_back(static_cast<int32_t>(j));
    }
  }

  static bool any_lane(Truth<Lanes<T>> truth) {
    Count<T> any = 0;
    for (int i = 0; i < L; ++i) any |= truth[i];
    return any != 0;
  }

  // Not the formulas of TripletScorer.
  void add(T* grad, int64_t padded) {
    if (slot.formula == Formula::extreme) return add_extremes();
    // In parentheses, which is this instruction set's: without them that of Slot's namespace would do as well.
    (with_formula<T>)(slot, [&](const auto& formula) {
      if constexpr (std::decay_t<decltype(formula)>::kExponential)
        add_exponents(formula, grad, padded);
      else
        add_scores(formula);
    });
  }
};
