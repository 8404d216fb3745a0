// Compiled once per instruction set: see for_each_isa.h. The two products of a sweep, in the compiler's vector types, blocked
// so that their accumulators fill the registers.

template <typename T>
struct VectorOf {
  // may_alias and the element's own alignment: loads from any T*.
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;  // the same as a value
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T>& vector_at(T* p) {
  return *reinterpret_cast<Vector<T>*>(p);
}
template <typename T>
inline const Vector<T>& vector_at(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// Accumulators take R x C registers, C more hold operands: 6 x 4 + 4 of 32, 6 x 2 + 2 of 16.
constexpr int kColumns = kVectorRegisters == 32 ? 4 : 2;

// Memory that is fetched into the second-level cache in as many steps as there is other work to do.
class Prefetch {
 public:
  Prefetch(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes), step_(round_up(ceil_div(bytes, steps), kLine)) {}
  void step() {
    for (const char* stop = std::min(next_ + step_, end_); next_ < stop; next_ += kLine)
      __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  const char* end_;
  int64_t step_;
};

// s[R][64], C vectors wide, += rows [R][.] times anchors [depth][64]; the last time, times the rows' factors [R].
template <int R, int C, typename T>
void similarity_kernel(const T* rows, int64_t stride, const T* anchors, int64_t depth, bool first, const T* factor,
                       T* s) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = first ? Vector<T>{} : vector_at(s + r * kAnchorBlock + c * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> z[C];
    for (int c = 0; c < C; ++c) z[c] = vector_at(anchors + k * kAnchorBlock + c * L);
    for (int r = 0; r < R; ++r) {
      const T u = rows[r * stride + k];
      for (int c = 0; c < C; ++c) sum[r][c] += z[c] * u;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      vector_at(s + r * kAnchorBlock + c * L) = factor != nullptr ? sum[r][c] * factor[r] : sum[r][c];
}

template <typename T>
struct Similarities {
  static constexpr int64_t kDepth = (32 << 10) / (kAnchorBlock * sizeof(T));  // 32 KiB of anchors at a time
  static constexpr int kWidth = kColumns * kLanes<T>;

  // How many steps of a prefetch compute() makes.
  static int64_t steps(int64_t rows, int64_t D) { return ceil_div(D, kDepth) * ceil_div(rows, kTileUnit); }

  // s[rows][64] = the tile's rows, normalised, times the anchors of a block [D][64].
  static void compute(const Tile<T>& tile, int64_t padded, int64_t D, const T* anchors, Prefetch& prefetch, T* s) {
    for (int64_t k = 0; k < D; k += kDepth)
      for (int64_t j = 0; j < tile.rows; j += kTileUnit) {
        prefetch.step();
        const T* factor = k + kDepth >= D ? tile.inverse_norm.data() + j : nullptr;
        for (int64_t i = 0; i < kAnchorBlock; i += kWidth)
          similarity_kernel<kTileUnit, kColumns>(tile.data + j * padded + k, padded, anchors + k * kAnchorBlock + i,
                                                 std::min(kDepth, D - k), k == 0, factor, s + j * kAnchorBlock + i);
      }
  }
};

// weights [64] of a row, so that they are those of the row before it is normalised.
template <typename T>
void scale_weights(T* weights, T inverse_norm) {
  for (int64_t i = 0; i < kAnchorBlock; i += kLanes<T>) vector_at(weights + i) *= inverse_norm;
}

// grad[R][.], C vectors wide, += weights [.][64] transposed times the listed rows of the tile.
template <int R, int C, typename T>
void gradient_kernel(const T* weights, const T* tile, int64_t padded, const int32_t* list, int64_t n, T* grad) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = vector_at(grad + r * padded + c * L);
  for (int64_t k = 0; k < n; ++k) {
    const T* row = tile + list[k] * padded;
    const T* w = weights + list[k] * kAnchorBlock;
    Vector<T> u[C];
    for (int c = 0; c < C; ++c) u[c] = vector_at(row + c * L);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += u[c] * w[r];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) vector_at(grad + r * padded + c * L) = sum[r][c];
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
