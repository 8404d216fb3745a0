// Compiled once per instruction set: see for_each_isa.h. What a loss of all triplets does with the rows that a scorer
// has. See ranks.h for the math.

// Of the anchors of a unit, how many negatives are above each threshold, where those are few: added up here, since
// every thread adds to Triplets.
template <typename T, int64_t kBlock>
class CountsAbove {
 public:
  explicit CountsAbove(int64_t blocks) : counts_(blocks * kCounts) { std::fill_n(of(0), blocks * kCounts, 0); }

  // [few][kBlock] of a block
  Count<T>* of(int64_t block) { return counts_.data() + block * kCounts; }

  // sums [kBlock]: what is active in how many triplets is known here alone, since a NaN is also above what fills up the
  // thresholds of an anchor that has fewer.
  void add_to(Triplets<T, kBlock>& triplets, int64_t block, int64_t first_anchor, RowSums* sums) {
    const int64_t few = triplets.few(first_anchor / kBlock);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t r = 0; r < std::min(few, triplets.collected[first_anchor + i]); ++r) {
        const int64_t negatives = of(block)[r * kBlock + i];
        if (negatives == 0) continue;
        triplets.count(first_anchor + i, r, static_cast<uint32_t>(negatives));
        sums[i].pairs += static_cast<double>(negatives);
      }
  }

 private:
  static constexpr int64_t kCounts = kFewThresholds * kBlock;
  Scratch<Count<T>> counts_;
};

// Some rows, and what is searched for each among the n > 0 thresholds of one anchor. The searches go through the
// same steps side by side, so that they overlap, in vectors where those can gather.
template <typename T>
struct Search {
  int64_t size = 0;
  int32_t row[kScoredRows];
  T x[kScoredRows];
  Count<T> found[kScoredRows];

  void add(int32_t of_row, T value, bool wanted) {
    row[size] = of_row;
    x[size] = value;
    size += wanted;
  }

  // How many of the first n are below.
  template <typename Below>
  void run(const T* thresholds, int64_t n, const Below& below) {
    std::fill_n(found, size, 0);
    for (Count<T> half = 0; n > 0; n -= half) {
      half = static_cast<Count<T>>((n + 1) / 2);
      const T* middle = thresholds + half - 1;
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) found[k] += below(middle[found[k]], x[k]) ? half : 0;
    }
  }
};

// What the scorer of a block adds to the triplets of anchors [first, first + kBlock).
template <typename T, int64_t kBlock>
struct TripletScorer {
  static constexpr int L = kLanes<T>;

  Scorer<T, kBlock>& scorer;
  Triplets<T, kBlock>& triplets;
  int64_t first;
  Count<T>* above;             // [few][kBlock]
  std::vector<int32_t>& list;  // of the rows that have a pair with a weight; the others' weights are not written

  // Calls f(row, first lane, which of the lanes are pairs) for all anchors of every row that the slot looks at.
  template <typename F>
  void each_vector(const F& f) {
    for (int64_t j = 0; j < scorer.rows.size; ++j)
      for (int64_t i = 0; scorer.looks_at(j) && i < kBlock; i += L) f(j, i, scorer.mask_of(j, i).on);
  }

  void collect() {
    each_vector([&](int64_t j, int64_t i, Truth<Lanes<T>> on) {
      for (int64_t lane = 0; lane < L; ++lane)
        if (on[lane]) triplets.collect(first + i + lane, scorer.s[j * kBlock + i + lane]);
    });
  }

  // Calls f(row, x = s + margin of the anchors) for the rows that are in some triplet. Where there is no pair, x is
  // -inf.
  template <typename F>
  void each_active_row(const F& f) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const T margin = static_cast<T>(scorer.slot.a);
    const T* lowest = triplets.lowest.data() + first;
    alignas(kVectorBytes) T x[kBlock];
    Truth<Lanes<T>> any;
    each_vector([&](int64_t j, int64_t i, Truth<Lanes<T>> on) {
      const Lanes<T> raised = load_lanes(scorer.s + j * kBlock + i) + margin;
      const Lanes<T> xs = on ? raised : Lanes<T>() + kNone;
      store_lanes(x + i, xs);
      any = (i == 0 ? Truth<Lanes<T>>() : any) | ~(xs <= load_lanes(lowest + i));
      if (i + L < kBlock || !scorer.any_lane(any)) return;
      f(j, x);
      list.push_back(static_cast<int32_t>(j));
    });
  }

  // Few thresholds: compares x with each, without a branch.
  void rank_few(int64_t few) {
    const T* thresholds = triplets.side_by_side(first / kBlock);
    T value[kBlock] = {};
    alignas(kVectorBytes) Count<T> positives[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) positives[i] = static_cast<Count<T>>(triplets.collected[first + i]);
    each_active_row([&](int64_t j, const T* x) {
      for (int64_t i = 0; i < kBlock; i += L) {
        const Lanes<T> xs = load_lanes(x + i), none = {};
        Lanes<T> cost = {};
        Lanes<Count<T>> active = {};
        for (int64_t r = 0; r < few; ++r) {
          const Lanes<T> t = load_lanes(thresholds + r * kBlock + i);
          const auto below = xs <= t;  // -1 where it is
          cost += below ? none : xs - t;
          active += below + 1;
          Count<T>* const counts = above + r * kBlock + i;
          store_lanes(counts, load_lanes(counts) + below + 1);
        }
        const Lanes<Count<T>> most = load_lanes(positives + i);  // a NaN is above what fills up, too
        active = active < most ? active : most;
        store_lanes(value + i, load_lanes(value + i) + cost);
        store_lanes(scorer.weight + j * kBlock + i, __builtin_convertvector(active, Lanes<T>));
      }
    });
    for (int64_t i = 0; i < kBlock; ++i) {
      if (triplets.collected[first + i] == 0 || value[i] == 0) continue;
      const T least = triplets.thresholds(first + i)[0];  // NaN if any is
      scorer.sums[i].value += static_cast<double>(least == least ? value[i] : least);
    }
  }

  // Many: finds the place of x among them, and counts the negatives of each place. One anchor after the other, since
  // its thresholds are as much as a cache holds.
  void rank_many() {
    each_active_row([&](int64_t j, const T* x) { std::copy(x, x + kBlock, scorer.weight + j * kBlock); });
    for (int64_t i = 0; i < kBlock; ++i) {
      const T lowest = triplets.lowest[first + i];
      T* const weights = scorer.weight + i;
      Search<T> search;
      for (const int32_t j : list) {
        const T x = weights[j * kBlock];
        search.add(j, x, is_below(lowest, x));
        weights[j * kBlock] = T(0);
      }
      search.run(triplets.thresholds(first + i), triplets.collected[first + i],
                 [](T t, T x) { return is_below(t, x); });
      double value = 0;
      int64_t pairs = 0;
      for (int64_t found = 0; found < search.size; ++found) {
        const int64_t k = search.found[found];
        if (k == 0) continue;  // a NaN and no thresholds
        triplets.count(first + i, k, 1);
        value += static_cast<double>(k) * static_cast<double>(search.x[found]);
        pairs += k;
        weights[search.row[found] * kBlock] = static_cast<T>(k);
      }
      scorer.sums[i].value += value;
      scorer.sums[i].pairs += static_cast<double>(pairs);
    }
  }

  // Positives, one anchor after the other, too. First marks them with a weight of 1.
  void weigh() {
    each_vector([&](int64_t j, int64_t i, Truth<Lanes<T>> on) {
      store_lanes(scorer.weight + j * kBlock + i, on ? Lanes<T>() + T(1) : Lanes<T>());
      if (i == 0) list.push_back(static_cast<int32_t>(j));
    });
    bool any[kScoredRows] = {};
    for (int64_t i = 0; i < kBlock; ++i) {
      T* const weights = scorer.weight + i;
      Search<T> search;
      for (const int32_t j : list) search.add(j, scorer.s[j * kBlock + i], weights[j * kBlock] != T(0));
      search.run(triplets.thresholds(first + i), triplets.collected[first + i] - 1,
                 [](T t, T x) { return sorts_before(t, x); });
      for (int64_t found = 0; found < search.size; ++found) {
        const int32_t j = search.row[found];
        weights[j * kBlock] = static_cast<T>(triplets.above(first + i)[search.found[found]]);
        any[j] |= weights[j * kBlock] != T(0);
      }
    }
    std::erase_if(list, [&](int32_t j) { return !any[j]; });
  }

  void add() {
    if (scorer.slot.formula == Formula::threshold) return collect();
    if (scorer.slot.formula == Formula::weigh) return weigh();
    const int64_t few = triplets.few(first / kBlock);
    return few >= 0 ? rank_few(few) : rank_many();
  }
};
