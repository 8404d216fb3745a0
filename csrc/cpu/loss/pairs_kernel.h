// Compiled once per instruction set: see for_each_isa.h. The pairs of a tile and a block of anchors that count, one by
// one, in the order of the rows: those that the screen finds and the positives, or these alone. So an anchor's sums have
// the bits that they would have with all pairs. pair_scores_kernel.h says what they cost.

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

// The pairs of a tile and a block of anchors that are listed, and their similarities. A template, so that nothing of it is
// compiled where there are no Eights; T is float.
template <typename T>
struct PairList {
  const Tile<T>& tile;
  const CodedAnchors& anchors;
  int64_t padded;
  Pair* pairs;  // [n] in the order of the rows
  int64_t n;

  Eight similarities(const Pair (&of)[8]) const {
    constexpr int kAtOnce = 4;  // pairs, whose addresses fit in registers
    Eight sum[8] = {};
    XBN_UNROLL
    for (int first = 0; first < 8; first += kAtOnce) {
      const float *u[kAtOnce], *z[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) {
        u[k] = tile.data + of[first + k].row * padded;
        z[k] = anchors.anchor(of[first + k].anchor);
      }
      Eight part[kAtOnce] = {};
      for (int64_t d = 0; d < padded; d += 8) {
        XBN_UNROLL
        for (int k = 0; k < kAtOnce; ++k) part[k] += at(z[k] + d).eight * at(u[k] + d).eight;
      }
      XBN_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum[first + k] = part[k];
    }
    const Eight all = fold_lanes(sum, [](auto x, auto y) { return x + y; });
    Eight inverse;
    for (int k = 0; k < 8; ++k) inverse[k] = tile.inverse_norm[of[k].row];
    return all * inverse;
  }

  // Calls f(eight pairs, how many of them there are, their similarities) for all of them.
  template <typename F>
  void each_eight(const F& f) const {
    for (int64_t first = 0; first < n; first += 8) {
      Pair eight[8];
      for (int64_t k = 0; k < 8; ++k) eight[k] = pairs[std::min(first + k, n - 1)];
      f(eight, static_cast<int>(std::min<int64_t>(n - first, 8)), similarities(eight));
    }
  }

  // Calls f(pair, similarity) for each.
  template <typename F>
  void each(const F& f) const {
    each_eight([&](const Pair(&eight)[8], int there, const Eight& s) {
      for (int k = 0; k < there; ++k) f(eight[k], s[k]);
    });
  }

  // grad [64][padded]: that of the pair's anchor, plus weight times the row, which is normalised.
  void add_row(const Pair& pair, float weight, float* grad) const {
    const float* row = tile.data + pair.row * padded;
    float* to = grad + pair.anchor * padded;
    weight *= tile.inverse_norm[pair.row];
    for (int64_t d = 0; d < padded; d += kLanes<float>)
      store_lanes(to + d, load_lanes(to + d) + load_lanes(row + d) * weight);
  }
};

#include "pair_scores_kernel.h"

// Where there are no vectors of that size, or the bank is float64, there is no screen.
template <typename T, bool is_there = std::is_same_v<T, float> && kHasEights>
class PairScreen {
 public:
  PairScreen(const Screen*, const SweepPlan&, const Pass&) {}
  void begin() {}
  void encode(const Tile<T>&, int64_t, int64_t) {}
  bool is_on() const { return false; }
  bool add(const Tile<T>&, const Sweep<T>&, int64_t, int64_t, Triplets<T, kAnchorBlock>*, CountsAbove<T, kAnchorBlock>&,
           bool, Contribution<T>&, Prefetch&) {
    return false;
  }
};

// Of one unit of a sweep.
template <typename T>
class PairScreen<T, true> {
 public:
  PairScreen(const Screen* screen, const SweepPlan& plan, const Pass& pass)
      : screen_(may_be_screened(pass) ? screen : nullptr),
        pass_(pass),
        padded_(plan.padded_dim),
        rows_(screen_ != nullptr ? round_up(plan.tile_rows, kTileUnit) : 0),
        codes_(has_negatives() ? rows_ * padded_ : 0),
        per_unit_(rows_),
        per_step_(rows_),
        limit_(rows_),
        per_step_32_(rows_),
        found_(rows_),
        pairs_(rows_ * kAnchorBlock),
        scores_(has_exponents(pass) ? rows_ * kAnchorBlock : 0) {}

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
  // overflow, or not finite, the tile is not screened. Without negatives there are no codes: it must be finite then, and
  // so short that its norm is.
  void encode(const Tile<T>& tile, int64_t first, int64_t last) {
    if (!on_) return;
    if (!has_negatives()) {
      // A row that is not finite makes the sums of all anchors of a block NaN, even of those with a weight of zero.
      for (int64_t j = first; j < last; ++j) on_ &= tile.inverse_norm[j] > 0;
      return;
    }
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
  // since the block cannot be screened or too many pairs are left. triplets may be null.
  bool add(const Tile<float>& tile, const Sweep<float>& sweep, int64_t block, int64_t place,
           Triplets<float, kAnchorBlock>* triplets, CountsAbove<float, kAnchorBlock>& above, bool gradient,
           Contribution<float>& part, Prefetch& prefetch) {
    if (!on_ || !screen_->anchors[block] || !screen_->anchors[block]->is_usable()) return false;
    const CodedAnchors& anchors = *screen_->anchors[block];
    const float* given = sweep.given.data() + block * kAnchorBlock;
    if (has_negatives()) {
      if (!limit(anchors, part.sums(0, place), given, triplets, block, tile.rows)) return false;
      screen_->products.find(codes_.data(), round_up(tile.rows, kTileUnit), padded_, anchors.codes(), anchors.start(),
                             limits_, prefetch, found_.data());
    } else {
      std::fill_n(found_.begin(), tile.rows, 0);
    }
    ++asked_;
    const int64_t n = list_pairs(tile, anchors);
    if (n < 0) {
      ++in_vain_;
      return false;
    }
    const PairList<T> list{tile, anchors, padded_, pairs_.data(), n};
    PairScorer<T>{list, pass_, place, gradient, part, given, scores_.data()}.add(triplets, above, block);
    return true;
  }

 private:
  static constexpr int kPause = 8;       // tiles
  static constexpr int64_t kMostOf = 6;  // at most one pair of so many is scored by itself

  // Where it has none, the positives are all that is listed, and nothing is to be found.
  bool has_negatives() const { return pass_.slot[0].pairs != Pairs::none; }

  // Finds out above which similarity a negative counts. False: of some anchor all do. Of the formulas that
  // may_be_screened (screen.h) says have such a limit.
  bool limit(const CodedAnchors& anchors, const RowSums* sums, const float* given,
             const Triplets<float, kAnchorBlock>* triplets, int64_t block, int64_t rows) {
    const Slot& slot = pass_.slot[0];
    switch (slot.formula) {
      case Formula::margin:
      case Formula::distance: return limit_all(anchors, rows);
      case Formula::extreme: return limit_each(anchors, rows, [&](int64_t i) { return sums[i].shift; });
      case Formula::exponent: return limit_each(anchors, rows, [&](int64_t i) { return double{given[i]}; });
      case Formula::rank: break;
      default: return false;
    }
    // A negative and the margin may round up to the lowest positive, and above it.
    const float* lowest = triplets->lowest.data() + block * kAnchorBlock;
    return limit_each(anchors, rows, [&](int64_t i) {
      const double threshold = lowest[i];  // infinity without a positive
      return std::isinf(threshold) ? threshold
                                   : threshold - slot.a - 1.2e-7 * (std::fabs(threshold) + std::fabs(slot.a));
    });
  }

  // By the margin.
  bool limit_all(const CodedAnchors& anchors, int64_t rows) {
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

  // By limit_of(anchor): the hardest negative so far, or what only harder ones are above.
  template <typename F>
  bool limit_each(const CodedAnchors& anchors, int64_t rows, const F& limit_of) {
    constexpr double kRounding = 4e-7;  // more than float32 may round in what follows
    constexpr double kHighest = 1e30;   // no similarity is above
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      const double limit = limit_of(i);
      // NaN takes this way, too. The anchors that fill up the block have a similarity of 0 to every row.
      if (!(limit > -std::numeric_limits<double>::infinity())) return false;
      const double slope = anchors.slope(std::min(limit, kHighest));
      slope_[i] = static_cast<float>(slope - kRounding * std::fabs(slope));
    }
    for (int64_t j = 0; j < rows; ++j) per_step_32_[j] = static_cast<float>(per_step_[j]);
    limits_ = {nullptr, slope_, per_step_32_.data(), static_cast<float>(anchors.offset() * (1 + kRounding) + 1)};
    return true;
  }

  // Lists what is found and the positives, without what is excluded, and returns how many; or -1 if they are too many.
  int64_t list_pairs(const Tile<float>& tile, const CodedAnchors& anchors) {
    const bool with_positives = pass_.slot[1].pairs != Pairs::none || pass_.slot[0].pairs == Pairs::all;
    int64_t n = 0;
    for (int64_t j = 0; j < tile.rows; ++j) {
      if (tile.mixed[j]) {
        const uint64_t positives = anchors.positives(tile.label[j]);
        found_[j] = (with_positives ? found_[j] | positives : found_[j] & ~positives);
        found_[j] &= ~anchors.excluded(tile.excluded[j]);
      }
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

  const Screen* screen_;
  const Pass& pass_;
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
  Scratch<ExponentOfPair> scores_;
  bool on_ = false;                  // the tile at hand
  int64_t asked_ = 0, in_vain_ = 0;  // blocks of the last tile, and those that had too many pairs
  int64_t to_skip_ = 0;              // tiles to come that are not screened
};
