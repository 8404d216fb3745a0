// Compiled once per instruction set: see for_each_isa.h. The two products of a sweep, in the compiler's vector types,
// blocked so that their accumulators fill the registers.

// What a bank row is multiplied by as it counts, from its sum of squares.
template <typename T>
T inverse_of_norm(T square, T eps) {
  return inverse_length(std::sqrt(square), eps);
}

// Accumulators take R x C registers, C more hold operands: 6 x 4 + 4 of 32, 6 x 2 + 2 of 16.
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 2;

// s[R][64], C vectors wide, = rows [R][D], normalised, times anchors [D][64]. Each sum is that of `chains` sums: the
// first of the first dimension and every `chains`th after it, and so on.
template <int chains, int R, int C, typename T>
void similarity_kernel(const T* rows, const T* inverse_norm, int64_t padded, const T* anchors, int64_t D,
                       Prefetch& prefetch, T* s) {
  constexpr int L = kLanes<T>;
  Prefetch ahead = prefetch;  // a copy, which stays in registers
  for (int chain = 0; chain < chains; ++chain) {
    Lanes<T> sum[R][C] = {};
    for (int64_t d = chain; d < D; d += chains) {
      ahead.step();
      Lanes<T> z[C];
      XBN_UNROLL
      for (int c = 0; c < C; ++c) z[c] = load_lanes(anchors + d * kAnchorBlock + c * L);
      XBN_UNROLL
      for (int r = 0; r < R; ++r) {
        const T u = rows[r * padded + d];
        XBN_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] += z[c] * u;
      }
    }
    XBN_UNROLL
    for (int r = 0; r < R; ++r) {
      XBN_UNROLL
      for (int c = 0; c < C; ++c) {
        T* const to = s + r * kAnchorBlock + c * L;
        if (chain > 0) sum[r][c] += load_lanes(to);
        store_lanes(to, chain + 1 < chains ? sum[r][c] : sum[r][c] * inverse_norm[r]);
      }
    }
  }
  prefetch = ahead;
}

// Folds rows [n][padded] by f, a vector at a time and then its lanes from the first to the last, and calls
// done(row, result) for each.
template <typename T, typename F, typename Done>
void fold_rows(const T* rows, int64_t n, int64_t padded, const F& f, const Done& done) {
  constexpr int L = kLanes<T>, kAtOnce = L < 8 ? L : 8;
  for (int64_t j = 0; j < n; j += L) {
    Lanes<T> each[L] = {};
    XBN_UNROLL
    for (int first = 0; first < L; first += kAtOnce) {
      if (j + first >= n) break;
      const T* row[kAtOnce];
      for (int r = 0; r < kAtOnce; ++r) row[r] = rows + std::min<int64_t>(j + first + r, n - 1) * padded;
      Lanes<T> so_far[kAtOnce] = {};
      for (int64_t d = 0; d < padded; d += L) {
        XBN_UNROLL
        for (int r = 0; r < kAtOnce; ++r) so_far[r] = f.add(so_far[r], load_lanes(row[r] + d));
      }
      XBN_UNROLL
      for (int r = 0; r < kAtOnce; ++r) each[first + r] = so_far[r];
    }
    const Lanes<T> all = fold_lanes(each, [&](Lanes<T> x, Lanes<T> y) { return f.merge(x, y); });
    for (int64_t r = 0; r < std::min<int64_t>(n - j, L); ++r) done(j + r, all[r]);
  }
}

template <typename T>
struct SumOfSquares {
  Lanes<T> add(Lanes<T> sum, Lanes<T> x) const { return sum + x * x; }
  Lanes<T> merge(Lanes<T> x, Lanes<T> y) const { return x + y; }
};

template <typename T>
struct LargestSize {
  Lanes<T> add(Lanes<T> most, Lanes<T> x) const { return merge(most, x < 0 ? -x : x); }
  Lanes<T> merge(Lanes<T> x, Lanes<T> y) const { return y > x ? y : x; }
};

template <typename T>
struct Similarities {
  static constexpr int kWidth = kColumns * kLanes<T>;

  // How many steps of a prefetch compute() makes.
  static int64_t steps(int64_t rows, int64_t D) { return D * ceil_div(rows, kTileUnit) * (kAnchorBlock / kWidth); }

  // s[rows][64] = the tile's rows, normalised, times the anchors of a block [D][64].
  template <int chains>
  static void compute(const Tile<T>& tile, int64_t padded, int64_t D, const T* anchors, Prefetch& prefetch, T* s) {
    for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
      const T* rows = tile.data + j * padded;
      const T* inverse_norm = tile.inverse_norm.data() + j;
      for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
        similarity_kernel<chains, kTileUnit, kColumns>(rows, inverse_norm, padded, anchors + i, D, prefetch,
                                                       s + j * kAnchorBlock + i);
    }
  }
};

// weights [64] of a row, so that they are those of the row before it is normalised.
template <typename T>
void scale_weights(T* weights, T inverse_norm) {
  for (int64_t i = 0; i < kAnchorBlock; i += kLanes<T>)
    store_lanes(weights + i, load_lanes(weights + i) * inverse_norm);
}

// grad[R][.], C vectors wide, += weights [.][64] transposed times the listed rows of the tile.
template <int R, int C, typename T>
void gradient_kernel(const T* weights, const T* tile, int64_t padded, const int32_t* list, int64_t n, T* grad) {
  constexpr int L = kLanes<T>;
  Lanes<T> sum[R][C];
  XBN_UNROLL
  for (int r = 0; r < R; ++r) {
    XBN_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = load_lanes(grad + r * padded + c * L);
  }
  for (int64_t k = 0; k < n; ++k) {
    const T* row = tile + list[k] * padded;
    const T* w = weights + list[k] * kAnchorBlock;
    Lanes<T> u[C];
    XBN_UNROLL
    for (int c = 0; c < C; ++c) u[c] = load_lanes(row + c * L);
    XBN_UNROLL
    for (int r = 0; r < R; ++r) {
      XBN_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] += u[c] * w[r];
    }
  }
  XBN_UNROLL
  for (int r = 0; r < R; ++r) {
    XBN_UNROLL
    for (int c = 0; c < C; ++c) store_lanes(grad + r * padded + c * L, sum[r][c]);
  }
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
