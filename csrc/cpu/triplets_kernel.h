// Part of loss_kernel.h: what the sweeps of a loss of all triplets do with a tile. See ../triplets.h for the math.

// Of the anchors of a unit, how many negatives are above each threshold, where those are few: added up here, since every
// thread adds to Triplets.
template <typename T>
class CountsAbove {
 public:
  explicit CountsAbove(int64_t blocks) : counts_(blocks * kBlock, 0) {}

  Count<T>* of(int64_t block) { return counts_.data() + block * kBlock; }

  void add_to(Triplets<T>& triplets, int64_t block, int64_t first_anchor) {
    for (int64_t i = 0; i < kAnchorBlock; ++i)
      for (int64_t r = 0; r < triplets.few[first_anchor / kAnchorBlock]; ++r) {
        const int64_t negatives = of(block)[r * kAnchorBlock + i];
        if (negatives > 0 && r < triplets.collected[first_anchor + i]) triplets.count(first_anchor + i, r, negatives);
      }
  }

 private:
  static constexpr int64_t kBlock = kFewThresholds * kAnchorBlock;
  std::vector<Count<T>> counts_;
};

// What the scorer of a block adds to the triplets of anchors [first, first + 64).
template <typename T>
struct TripletScorer {
  Scorer<T>& scorer;
  Triplets<T>& triplets;
  int64_t first;
  Count<T>* above;  // [few][64]

  void collect() {
    scorer.each_row([&](int64_t j, auto, const auto& mask) {
      for (int64_t i = 0; i < kAnchorBlock; ++i)
        if (mask.on[i]) triplets.collect(first + i, scorer.s[j * kAnchorBlock + i]);
    });
  }

  // Calls f(row, x = s + margin of the anchors) for the rows that are in some triplet. Where a pair is none, x is -inf.
  template <typename F>
  void each_active_row(const F& f) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const T margin = static_cast<T>(scorer.slot.a);
    const T* lowest = triplets.lowest.data() + first;
    alignas(kVectorBytes) T x[kAnchorBlock];
    scorer.each_row([&](int64_t j, auto mixed, const auto& mask) {
      const T* row = scorer.s + j * kAnchorBlock;
      int any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        x[i] = !mixed || mask.on[i] ? row[i] + margin : kNone;
        any |= !(x[i] <= lowest[i]);
      }
      if (!any) return;
      f(j, x);
      scorer.list.push_back(static_cast<int32_t>(j));
    });
  }

  // Few thresholds: compares x with each, without a branch.
  void rank_few(int64_t few) {
    constexpr int L = kLanes<T>;
    const T* thresholds = triplets.side_by_side(first / kAnchorBlock);
    T value[kAnchorBlock] = {}, pairs[kAnchorBlock] = {};
    each_active_row([&](int64_t j, const T* x) {
      for (int64_t i = 0; i < kAnchorBlock; i += L) {
        const Vector<T> xs = vector_at(x + i), none = {};
        Vector<T> cost = {};
        Vector<Count<T>> active = {};
        for (int64_t r = 0; r < few; ++r) {
          const Vector<T> t = vector_at(thresholds + r * kAnchorBlock + i);
          const auto below = xs <= t;  // -1 where it is
          cost += below ? none : xs - t;
          active += below + 1;
          vector_at(above + r * kAnchorBlock + i) += below + 1;
        }
        const Vector<T> weight = __builtin_convertvector(active, Vector<T>);
        vector_at(value + i) += cost;
        vector_at(pairs + i) += weight;
        vector_at(scorer.weight + j * kAnchorBlock + i) = weight;
      }
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      if (triplets.collected[first + i] == 0 || pairs[i] == 0) continue;
      const T least = triplets.thresholds(first + i)[0];  // NaN if any is
      scorer.sums[i].value += static_cast<double>(least == least ? value[i] : least);
      scorer.sums[i].pairs += static_cast<double>(pairs[i]);
    }
  }

  // Many: finds the place of x among them, and counts the negatives of each place.
  void rank_many() {
    each_active_row([&](int64_t j, const T* x) {
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        const int64_t n = x[i] <= triplets.lowest[first + i] ? 0 : triplets.collected[first + i];
        const int64_t k = rank_among(triplets.thresholds(first + i), n, x[i]);
        scorer.weight[j * kAnchorBlock + i] = static_cast<T>(k);
        if (k == 0) continue;
        triplets.count(first + i, k, 1);
        scorer.sums[i].value += static_cast<double>(k) * static_cast<double>(x[i]);
        scorer.sums[i].pairs += static_cast<double>(k);
      }
    });
  }

  void weigh() {
    scorer.each_row([&](int64_t j, auto, const auto& mask) {
      bool any = false;
      for (int64_t i = 0; i < kAnchorBlock; ++i) {
        T weight = 0;
        if (mask.on[i]) {
          const T s = scorer.s[j * kAnchorBlock + i];
          const int64_t r = place_among(triplets.thresholds(first + i), triplets.collected[first + i], s);
          weight = static_cast<T>(triplets.above(first + i)[r]);
        }
        scorer.weight[j * kAnchorBlock + i] = weight;
        any |= weight != T(0);
      }
      if (any) scorer.list.push_back(static_cast<int32_t>(j));
    });
  }

  void add() {
    const int64_t few = triplets.few[first / kAnchorBlock];
    if (scorer.slot.formula == Formula::threshold) return collect();
    if (scorer.slot.formula == Formula::weigh) return weigh();
    return few >= 0 ? rank_few(few) : rank_many();
  }
};
