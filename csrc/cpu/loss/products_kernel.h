// Compiled once per instruction set: see for_each_isa.h. The two products of a sweep, in the compiler's vector types,
// blocked so that their accumulators fill the registers.

// What a bank row is multiplied by as it counts, from its sum of squares.
template <typename T>
T inverse_of_norm(T square, T eps) {
  const T norm = std::sqrt(square);
  return T(1) / (norm < eps ? eps : norm);
}

// Accumulators take R x C registers, C more hold operands: 6 x 4 + 4 of 32, 6 x 2 + 2 of 16.
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 2;

// s[R][64], C vectors wide, = rows [R][D], normalised, times anchors [D][64].
template <int R, int C, typename T>
void similarity_kernel(const T* rows, const T* inverse_norm, int64_t padded, const T* anchors, int64_t D,
                       Prefetch& prefetch, T* s) {
  constexpr int L = kLanes<T>;
  Lanes<T> sum[R][C] = {};
  Prefetch ahead = prefetch;  // a copy, which stays in registers
  for (int64_t d = 0; d < D; ++d) {
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
  prefetch = ahead;
  XBN_UNROLL
  for (int r = 0; r < R; ++r) {
    XBN_UNROLL
    for (int c = 0; c < C; ++c) store_lanes(s + r * kAnchorBlock + c * L, sum[r][c] * inverse_norm[r]);
  }
}

// inverse_norm [R] of the rows [R][padded].
template <int R, typename T>
void norm_kernel(const T* rows, int64_t padded, T eps, T* inverse_norm) {
  constexpr int L = kLanes<T>;
  Lanes<T> sum[R] = {};
  for (int64_t d = 0; d < padded; d += L) {
    XBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes<T> u = load_lanes(rows + r * padded + d);
      sum[r] += u * u;
    }
  }
  for (int r = 0; r < R; ++r) {
    T square = 0;
    for (int i = 0; i < L; ++i) square += sum[r][i];
    inverse_norm[r] = inverse_of_norm(square, eps);
  }
}

template <typename T>
struct Similarities {
  static constexpr int kWidth = kColumns * kLanes<T>;

  // How many steps of a prefetch compute() makes.
  static int64_t steps(int64_t rows, int64_t D) { return D * ceil_div(rows, kTileUnit) * (kAnchorBlock / kWidth); }

  // s[rows][64] = the tile's rows, normalised, times the anchors of a block [D][64]. Norms that the tile lacks are
  // taken just before: a row then comes into the first-level cache once for both.
  static void compute(Tile<T>& tile, int64_t padded, int64_t D, const T* anchors, Prefetch& prefetch, T* s) {
    for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
      const T* rows = tile.data + j * padded;
      T* inverse_norm = tile.inverse_norm.data() + j;
      if (tile.lacks_norms) norm_kernel<kTileUnit>(rows, padded, tile.eps, inverse_norm);
      if (tile.out[j]) continue;
      for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
        similarity_kernel<kTileUnit, kColumns>(rows, inverse_norm, padded, anchors + i, D, prefetch,
                                               s + j * kAnchorBlock + i);
    }
    tile.lacks_norms = false;
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
