// Compiled once per instruction set: see for_each_isa.h. The pairs of a tile and a block of anchors that the screen
// finds, one by one, in the order of the rows: their similarities, what they cost, and their part of the gradient. So an
// anchor's sums have the bits that they would have with all pairs.

// A row of a tile and an anchor of a block.
struct Pair {
  int16_t row;
  int8_t anchor;
  bool positive;
};

// Similarities are computed in eights, whose chains are those of similarity_kernel.
typedef float Eight __attribute__((vector_size(4 * kPairChains)));
struct __attribute__((packed, may_alias)) AnyEight {
  Eight eight;
};
inline const AnyEight& at(const float* p) { return *reinterpret_cast<const AnyEight*>(p); }

#if defined(__aarch64__)
constexpr bool kHasEights = true;  // as two vectors
#else
constexpr bool kHasEights = kVectorBytes >= sizeof(Eight);
#endif

// Where there are no vectors of that size, or the bank is float64, there is no screen.
template <typename T, bool is_there = std::is_same_v<T, float> && kHasEights>
class PairScreen {
 public:
  PairScreen(const Screen*, const SweepPlan&) {}
  void begin() {}
  void encode(const Tile<T>&, int64_t, int64_t) {}
  bool is_on() const { return false; }
  bool add(const Tile<T>&, int64_t, int64_t, const Pass&, bool, Contribution<T>&, Prefetch&) { return false; }
};

template <typename T>
class PairScreen<T, true> {
 public:
  PairScreen(const Screen* screen, const SweepPlan& plan)
      : screen_(screen),
        padded_(plan.padded_dim),
        rows_(screen != nullptr ? round_up(plan.tile_rows, kTileUnit) : 0),
        codes_(rows_ * padded_),
        per_unit_(rows_),
        per_step_(rows_),
        limit_(rows_),
        per_step_32_(rows_),
        found_(rows_),
        pairs_(rows_ * kAnchorBlock) {}

  // Before the next tile is loaded: whether it is to be screened.
  void begin() {
    // Where it does not pay, as with few classes, most tiles are not.
    if (asked_ > 0) to_skip_ = 2 * in_vain_ > asked_ ? kPause : 0;
    asked_ = in_vain_ = 0;
    on_ = screen_ != nullptr && to_skip_ == 0;
    if (to_skip_ > 0) --to_skip_;
  }
  bool is_on() const { return on_; }

  // The codes of rows [first, last). If one of them may be so short that its squares underflow, or so long that they
  // overflow, or not finite, the tile is not screened.
  void encode(const Tile<T>& tile, int64_t first, int64_t last) {
    if (!on_) return;
    constexpr float kLeastInverse = 1e-15F, kMostInverse = 1e9F;
    const float row_code = static_cast<float>(screen_->products.row_code);
    const float* rows = tile.data + first * padded_;
    fold_rows(rows, last - first, padded_, LargestSize<float>(), [&](int64_t r, float largest) {
      const float inverse = tile.inverse_norm[first + r];
      on_ &= kLeastInverse < inverse && inverse < kMostInverse;
      per_unit_[first + r] = largest > 1e-30F ? row_code / largest : 0;
      per_step_[first + r] = static_cast<double>(row_code) / (static_cast<double>(largest) * inverse);
    });
    screen_->products.encode(rows, last - first, padded_, per_unit_.data() + first, codes_.data() + first * padded_);
  }

  // Adds the tile's pairs with a block of anchors, which is number `place` of its group. False: it has added nothing,
  // since the block cannot be screened or too many pairs are left.
  bool add(const Tile<float>& tile, int64_t block, int64_t place, const Pass& pass, bool gradient,
           Contribution<float>& part, Prefetch& prefetch) {
    if (!on_ || !screen_->anchors[block] || !screen_->anchors[block]->is_usable()) return false;
    const CodedAnchors& anchors = *screen_->anchors[block];
    const bool extremes = pass.slot[0].formula == Formula::extreme;
    if (!(extremes ? limit_by_hardest(anchors, part.sums(0, place), tile.rows) : limit_by_margin(anchors, tile.rows)))
      return false;
    ++asked_;
    screen_->products.find(codes_.data(), round_up(tile.rows, kTileUnit), padded_, anchors.codes(), anchors.start(),
                           limits_, prefetch, found_.data());
    const int64_t n = list_pairs(tile, anchors);
    if (n < 0) {
      ++in_vain_;
      return false;
    }
    if (extremes)
      score_extremes(tile, anchors, n, place, part);
    else
      score_margins(tile, anchors, n, place, pass, gradient, part);
    return true;
  }

 private:
  static constexpr int kPause = 8;       // tiles
  static constexpr int64_t kMostOf = 6;  // at most one pair of so many is scored by itself

  // Negatives count above the margin.
  bool limit_by_margin(const CodedAnchors& anchors, int64_t rows) {
    constexpr double kLeast = std::numeric_limits<int32_t>::min() + 1, kMost = std::numeric_limits<int32_t>::max();
    const double slope = anchors.slope(screen_->margin), offset = anchors.offset();
    for (int64_t j = 0; j < rows; ++j) {
      const double most = slope * per_step_[j] - offset;
      // Not above kLeast: neither is a NaN.
      limit_[j] = static_cast<int32_t>(most > kLeast ? (most < kMost ? most : kMost) : kLeast) - 1;
    }
    limits_.of_row = limit_.data();
    return true;
  }

  // Negatives count above the hardest one so far. False: an anchor has none.
  bool limit_by_hardest(const CodedAnchors& anchors, const RowSums* sums, int64_t rows) {
    constexpr double kRounding = 4e-7;  // more than float32 may round in what follows
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      // NaN takes this way, too. The anchors that fill up the block have a similarity of 0 to every row.
      if (!(sums[i].shift > -std::numeric_limits<double>::infinity())) return false;
      const double slope = anchors.slope(sums[i].shift);
      slope_[i] = static_cast<float>(slope - kRounding * std::fabs(slope));
    }
    for (int64_t j = 0; j < rows; ++j) per_step_32_[j] = static_cast<float>(per_step_[j]);
    limits_ = {nullptr, slope_, per_step_32_.data(), static_cast<float>(anchors.offset() * (1 + kRounding) + 1)};
    return true;
  }

  // Lists what is found and the positives, without what is excluded, and returns how many; or -1 if they are too many.
  int64_t list_pairs(const Tile<float>& tile, const CodedAnchors& anchors) {
    int64_t n = 0;
    for (int64_t j = 0; j < tile.rows; ++j) {
      if (tile.mixed[j])
        found_[j] = (found_[j] | anchors.positives(tile.label[j])) & ~anchors.excluded(tile.excluded[j]);
      found_[j] &= anchors.all();
      n += __builtin_popcountll(found_[j]);
    }
    if (!screen_->always && n * kMostOf > tile.rows * kAnchorBlock) return -1;
    Pair* next = pairs_.data();
    for (int64_t j = 0; j < tile.rows; ++j) {
      const uint64_t positives = tile.mixed[j] ? anchors.positives(tile.label[j]) : 0;
      for (uint64_t left = found_[j]; left != 0; left &= left - 1) {
        const int i = __builtin_ctzll(left);
        *next++ = {static_cast<int16_t>(j), static_cast<int8_t>(i), (positives >> i & 1) != 0};
      }
    }
    return n;
  }

  // The similarities of eight pairs.
  void similarities(const Tile<float>& tile, const CodedAnchors& anchors, const Pair (&pairs)[8], float (&s)[8]) const {
    constexpr int kAtOnce = 4;  // pairs, whose addresses fit in registers
    Eight sum[8] = {};
    XBN_UNROLL
    for (int first = 0; first < 8; first += kAtOnce) {
      const float *u[kAtOnce], *z[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) {
        u[k] = tile.data + pairs[first + k].row * padded_;
        z[k] = anchors.anchor(pairs[first + k].anchor);
      }
      Eight part[kAtOnce] = {};
      for (int64_t d = 0; d < padded_; d += 8) {
        XBN_UNROLL
        for (int k = 0; k < kAtOnce; ++k) part[k] += at(z[k] + d).eight * at(u[k] + d).eight;
      }
      XBN_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum[first + k] = part[k];
    }
    const Eight all = fold_lanes(sum, [](auto x, auto y) { return x + y; });
    for (int k = 0; k < 8; ++k) s[k] = all[k] * tile.inverse_norm[pairs[k].row];
  }

  // Calls f(pair, similarity) for the n pairs that are listed, in their order.
  template <typename F>
  void each_pair(const Tile<float>& tile, const CodedAnchors& anchors, int64_t n, const F& f) const {
    for (int64_t first = 0; first < n; first += 8) {
      Pair eight[8];
      float s[8];
      for (int64_t k = 0; k < 8; ++k) eight[k] = pairs_.data()[std::min(first + k, n - 1)];
      similarities(tile, anchors, eight, s);
      for (int64_t k = 0; k < std::min<int64_t>(n - first, 8); ++k) f(eight[k], s[k]);
    }
  }

  void score_margins(const Tile<float>& tile, const CodedAnchors& anchors, int64_t n, int64_t place, const Pass& pass,
                     bool gradient, Contribution<float>& part) const {
    // A pass has one slot for all pairs, or two.
    const bool apart = pass.slot[1].pairs != Pairs::none;
    const MarginFormula<float> formula{static_cast<float>(pass.slot[0].a), static_cast<float>(pass.slot[0].b)};
    AnchorSums sums[kSlots] = {};
    each_pair(tile, anchors, n, [&](const Pair& pair, float s) {
      const Score<float> score = formula(s, pair.positive, 0.0F);
      if (!score.counts) return;
      const int slot = apart && pair.positive ? 1 : 0;
      sums[slot].add(pair.anchor, score);
      if (!gradient) return;
      float* grad = part.grad(slot, place);
      char& touched = part.touched(slot, place);
      if (!touched) std::fill(grad, grad + kAnchorBlock * padded_, 0.0F);
      touched = 1;
      add_row(tile.data + pair.row * padded_, score.weight * tile.inverse_norm[pair.row], grad + pair.anchor * padded_);
    });
    for (int slot = 0; slot < kSlots; ++slot) sums[slot].add_to(part.sums(slot, place));
  }

  // The hardest negative and positive of each anchor.
  void score_extremes(const Tile<float>& tile, const CodedAnchors& anchors, int64_t n, int64_t place,
                      Contribution<float>& part) const {
    RowSums* const sums[kSlots] = {part.sums(0, place), part.sums(1, place)};
    each_pair(tile, anchors, n, [&](const Pair& pair, float s) {
      RowSums& sum = sums[pair.positive][pair.anchor];
      const float x = pair.positive ? -s : s;
      if (pair.positive) sum.pairs += 1;
      if (!exceeds(x, static_cast<float>(sum.shift))) return;
      sum.shift = x;
      sum.value = static_cast<double>(tile.bank_row[pair.row]);
    });
    // Of negatives it only matters whether there are any.
    uint64_t has = 0;
    for (int64_t j = 0; j < tile.rows; ++j)
      has |= anchors.all() & ~(anchors.positives(tile.label[j]) | anchors.excluded(tile.excluded[j]));
    for (int64_t i = 0; i < kAnchorBlock; ++i) sums[0][i].pairs += static_cast<double>(has >> i & 1);
  }

  // grad [padded] += weight * row
  void add_row(const float* row, float weight, float* grad) const {
    for (int64_t d = 0; d < padded_; d += kLanes<float>)
      store_lanes(grad + d, load_lanes(grad + d) + load_lanes(row + d) * weight);
  }

  // Of the pairs of a tile and the anchors of a block.
  struct AnchorSums {
    uint64_t has;  // which anchors have any
    float value[kAnchorBlock], weight[kAnchorBlock], pairs[kAnchorBlock];

    void add(int64_t i, const Score<float>& score) {
      has |= uint64_t{1} << i;
      value[i] += score.value;
      weight[i] += score.weight;
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

  const Screen* screen_;
  int64_t padded_, rows_;
  Scratch<uint8_t> codes_;          // [rows][padded]
  std::vector<float> per_unit_;     // [rows] 1 / step, by which a row is encoded
  std::vector<double> per_step_;    // [rows] 1 / step of the row as it counts
  std::vector<int32_t> limit_;      // [rows]
  std::vector<float> per_step_32_;  // [rows]
  float slope_[kAnchorBlock];
  CodeLimits limits_ = {};
  std::vector<uint64_t> found_;  // [rows]
  Scratch<Pair> pairs_;
  bool on_ = false;                  // the tile at hand
  int64_t asked_ = 0, in_vain_ = 0;  // blocks of the last tile, and those that had too many pairs
  int64_t to_skip_ = 0;              // tiles to come that are not screened
};
