// Compiled once per instruction set: see for_each_isa.h. Finds the rows of a split's tiles that are out: see screen.h.

template <typename T>
class TileScreen {
 public:
  TileScreen(const Screen*, const SweepPlan&) {}
  bool begin(const Tile<T>&) { return false; }
  int64_t steps(int64_t) const { return 1; }
  void mark(const Tile<T>&, int64_t, Prefetch&) {}
};

template <>
class TileScreen<float> {
 public:
  TileScreen(const Screen* screen, const SweepPlan& plan)
      : screen_(screen), padded_(plan.padded_dim), coded_(screen != nullptr ? plan.tile_rows : 0, padded_) {}

  // Makes the tile ready to be screened. False: it is not to be screened.
  bool begin(Tile<float>& tile) {
    if (screen_ == nullptr) return false;
    // Where it does not pay, as with few classes, most tiles are not screened.
    if (asked_ > 0) to_skip_ = 2 * found_ < asked_ ? kPause : 0;
    on_ = to_skip_ == 0;
    asked_ = found_ = 0;
    if (!on_) {
      --to_skip_;
      return false;
    }
    for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
      const float* rows = tile.data + j * padded_;
      float* inverse_norm = tile.inverse_norm.data() + j;
      if (tile.lacks_norms) norm_kernel<kTileUnit>(rows, padded_, tile.eps, inverse_norm);
      coded_.encode(rows, inverse_norm, j);
    }
    tile.lacks_norms = false;
    return true;
  }

  // How many steps of a prefetch mark() makes.
  int64_t steps(int64_t rows) const { return 2 * ceil_div(screen_->dim, 4) * ceil_div(rows, kTileUnit); }

  // Before the tile is multiplied by a block of anchors.
  void mark(Tile<float>& tile, int64_t block, Prefetch& prefetch) {
    if (screen_ == nullptr) return;
    const bool ask = on_ && screen_->usable[block];
    for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
      const auto mixed = tile.mixed.begin() + j, end = std::min(mixed + kTileUnit, tile.mixed.begin() + tile.rows);
      const bool out = ask && std::find(mixed, end, char{1}) == end &&
                       coded_.is_below(screen_->margin, screen_->anchors[block], j, prefetch);
      std::fill_n(tile.out.begin() + j, kTileUnit, out);
      asked_ += ask;
      found_ += out;
    }
  }

 private:
  static constexpr int kPause = 4;  // tiles

  const Screen* screen_;
  int64_t padded_;
  CodedTile coded_;
  bool on_ = false;
  int64_t asked_ = 0, found_ = 0;  // units of the last tile, and which of them were out
  int64_t to_skip_ = 0;            // tiles to come that are not asked about
};
