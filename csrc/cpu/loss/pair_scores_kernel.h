// Compiled once per instruction set: see for_each_isa.h. What the pairs of a list cost and weigh, to the bits that
// score_kernel.h and triplets_kernel.h give the same pairs among all others.

// What is kept of a pair between the search for an anchor's largest exponent and the sums.
struct ExponentOfPair {
  float x, slope;
};

inline bool has_exponents(const Pass& pass) {
  return pass.slot[0].formula == Formula::exponent || pass.slot[1].formula == Formula::exponent;
}

template <typename T>
struct PairScorer {
  PairList<T> list;
  const Pass& pass;
  int64_t place;  // of the block in its group
  bool gradient;
  Contribution<T>& part;
  const float* given;      // [64]
  ExponentOfPair* scores;  // [list.n] room, for exponents

  // The gradient of a slot; zeros, if nothing has been added to it.
  float* grad_of(int slot) const {
    float* grad = part.grad(slot, place);
    char& touched = part.touched(slot, place);
    if (!touched) std::fill(grad, grad + kAnchorBlock * list.padded, 0.0F);
    touched = 1;
    return grad;
  }

  // Of the pairs of a tile and the anchors of a block.
  struct AnchorSums {
    uint64_t has;  // which anchors have any
    float value[kAnchorBlock], weight[kAnchorBlock], pairs[kAnchorBlock];

    void add(int64_t i, float its_value, float its_weight) {
      has |= uint64_t{1} << i;
      value[i] += its_value;
      weight[i] += its_weight;
      pairs[i] += 1;
    }
    void add_to(RowSums* sums) const {
      for (uint64_t left = has; left != 0; left &= left - 1) {
        const int i = __builtin_ctzll(left);
        sums[i].value += static_cast<double>(value[i]);
        sums[i].weight += static_cast<double>(weight[i]);
        sums[i].pairs += static_cast<double>(pairs[i]);
      }
    }
  };

  // Formulas of scores. A pass has one slot for all pairs, or two, or only that of the positives.
  template <typename F>
  void add_scores(const F& formula) const {
    const bool apart = pass.slot[1].pairs != Pairs::none;
    AnchorSums sums[kSlots] = {};
    list.each([&](const Pair& pair, float s) {
      const Score<float> score = formula(s, pair.positive, given[pair.anchor]);
      if (!score.counts) return;
      const int slot = apart && pair.positive ? 1 : 0;
      sums[slot].add(pair.anchor, score.value, F::kSumsWeights ? score.weight : 0.0F);
      if (gradient) list.add_row(pair, score.weight, grad_of(slot));
    });
    for (int slot = 0; slot < kSlots; ++slot) sums[slot].add_to(part.sums(slot, place));
  }

  // Exponents of one slot: the largest of each anchor, then the sums that go with it.
  void add_exponents(int slot) const {
    const Slot& its = pass.slot[slot];
    const ExponentFormula<T> formula{static_cast<T>(its.a), its.mined};
    RowSums* const sums = part.sums(slot, place);
    float top[kAnchorBlock];
    for (int64_t i = 0; i < kAnchorBlock; ++i) top[i] = static_cast<float>(sums[i].shift);
    int64_t n = 0;  // pairs that count, which take the first places of the list
    list.each_eight([&](const Pair(&eight)[8], int there, const Eight& s) {
      Truth<Eight> positive;
      Eight limit;
      for (int k = 0; k < 8; ++k) positive[k] = -eight[k].positive, limit[k] = given[eight[k].anchor];
      const Exponent<Eight> e = formula(s, positive, limit);
      for (int k = 0; k < there; ++k) {
        if (e.counts[k] == 0) continue;
        float& its_top = top[eight[k].anchor];
        its_top = e.x[k] > its_top ? e.x[k] : its_top;
        scores[n] = {e.x[k], e.slope[k]};
        list.pairs[n++] = eight[k];
      }
    });
    float* const former = gradient && part.touched(slot, place) ? part.grad(slot, place) : nullptr;
    for (int64_t i = 0; i < kAnchorBlock; ++i) rescale_sums(sums[i], top[i], former, i, list.padded);

    AnchorSums terms = {};
    for (int64_t first = 0; first < n; first += 8) {
      const int there = static_cast<int>(std::min<int64_t>(n - first, 8));
      Eight x = {};
      for (int k = 0; k < there; ++k) x[k] = scores[first + k].x - top[list.pairs[first + k].anchor];
      const Eight term = exp_of_negative(x);
      for (int k = 0; k < there; ++k) {
        const Pair& pair = list.pairs[first + k];
        terms.add(pair.anchor, term[k], 0.0F);
        const float weight = scores[first + k].slope * term[k];
        if (gradient && weight != 0) list.add_row(pair, weight, grad_of(slot));
      }
    }
    terms.add_to(sums);
  }

  // The hardest positive of each anchor and, where the pass has them, the hardest negative.
  void add_extremes() const {
    RowSums* const sums[kSlots] = {part.sums(0, place), part.sums(1, place)};
    list.each([&](const Pair& pair, float s) {
      RowSums& sum = sums[pair.positive][pair.anchor];
      const float x = pair.positive ? -s : s;
      if (pair.positive) sum.pairs += 1;
      if (!exceeds(x, static_cast<float>(sum.shift))) return;
      sum.shift = x;
      sum.value = static_cast<double>(list.tile.bank_row[pair.row]);
    });
    if (pass.slot[0].pairs == Pairs::none) return;
    // Of negatives it only matters whether there are any.
    const CodedAnchors& anchors = list.anchors;
    uint64_t has = 0;
    for (int64_t j = 0; j < list.tile.rows; ++j)
      has |= anchors.all() & ~(anchors.positives(list.tile.label[j]) | anchors.excluded(list.tile.excluded[j]));
    for (int64_t i = 0; i < kAnchorBlock; ++i) sums[0][i].pairs += static_cast<double>(has >> i & 1);
  }

  // Negatives among the thresholds of their anchors; see TripletScorer.
  void rank(Triplets<float, kAnchorBlock>& triplets, int64_t block, Count<float>* above) const {
    const int64_t first = block * kAnchorBlock, few = triplets.few(block);
    const float margin = static_cast<float>(pass.slot[0].a);
    RowSums* const sums = part.sums(0, place);
    float value[kAnchorBlock] = {};
    double value_of_many[kAnchorBlock] = {};
    list.each([&](const Pair& pair, float s) {
      const int64_t i = first + pair.anchor;
      const float x = s + margin;
      if (!is_below(triplets.lowest[i], x)) return;
      int64_t active = 0;
      if (few >= 0) {
        float cost = 0;
        const float* const side_by_side = triplets.side_by_side(block) + pair.anchor;
        for (int64_t r = 0; r < few; ++r) {
          const float t = side_by_side[r * kAnchorBlock];
          if (!is_below(t, x)) continue;
          cost += x - t;
          above[r * kAnchorBlock + pair.anchor] += 1;
          ++active;
        }
        active = std::min(active, triplets.collected[i]);  // a NaN is above what fills up, too
        value[pair.anchor] += cost;
      } else {
        active = rank_among(triplets.thresholds(i), triplets.collected[i], x);
        if (active == 0) return;  // a NaN and no thresholds
        triplets.count(i, active, 1);
        value_of_many[pair.anchor] += static_cast<double>(active) * static_cast<double>(x);
        sums[pair.anchor].pairs += static_cast<double>(active);
      }
      if (gradient && active != 0) list.add_row(pair, static_cast<float>(active), grad_of(0));
    });
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      if (few < 0) sums[i].value += value_of_many[i];
      if (few < 0 || triplets.collected[first + i] == 0 || value[i] == 0) continue;
      const float least = triplets.thresholds(first + i)[0];  // NaN if any is
      sums[i].value += static_cast<double>(least == least ? value[i] : least);
    }
  }

  // Positives, by how many negatives are above them.
  void weigh(const Triplets<float, kAnchorBlock>& triplets, int64_t block) const {
    list.each([&](const Pair& pair, float s) {
      const int64_t i = block * kAnchorBlock + pair.anchor;
      const int64_t found = place_among(triplets.thresholds(i), triplets.collected[i], s);
      const float weight = static_cast<float>(triplets.above(i)[found]);
      if (gradient && weight != 0) list.add_row(pair, weight, grad_of(1));
    });
  }

  // triplets may be null, if no formula is of triplets.
  void add(Triplets<float, kAnchorBlock>* triplets, CountsAbove<float, kAnchorBlock>& above, int64_t block) const {
    const int slot = pass.slot[0].pairs == Pairs::none ? 1 : 0;
    switch (pass.slot[slot].formula) {
      case Formula::exponent: return add_exponents(slot);
      case Formula::extreme: return add_extremes();
      case Formula::threshold:
        return list.each([&](const Pair& pair, float s) { triplets->collect(block * kAnchorBlock + pair.anchor, s); });
      case Formula::rank: return rank(*triplets, block, above.of(place));
      case Formula::weigh: return weigh(*triplets, block);
      default:
        return (with_formula<float>)(pass.slot[slot], [&](const auto& formula) {
          // may_be_screened (screen.h) lets no other exponents through.
          if constexpr (!std::remove_reference_t<decltype(formula)>::kExponential) add_scores(formula);
        });
    }
  }
};
