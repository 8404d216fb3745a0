// Compiled once per instruction set: see for_each_isa.h. The compiler's vector types.

// What gcc does not do by itself: so that an array of vectors is one of registers from its first line to its last.
#define XBN_UNROLL _Pragma("GCC unroll 16")

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Lanes anywhere in an array, as the compilers' own intrinsics read and write them. A pointer to vectors that are
// aligned as their elements are would do for gcc; in a template clang forgets that they are. A memcpy makes gcc copy
// them twice.
template <typename T>
struct __attribute__((packed, may_alias)) Anywhere {
  Lanes<T> lanes;
};
template <typename T>
inline Lanes<T> load_lanes(const T* p) {
  return reinterpret_cast<const Anywhere<T>*>(p)->lanes;
}
template <typename T>
inline void store_lanes(T* p, Lanes<T> lanes) {
  reinterpret_cast<Anywhere<T>*>(p)->lanes = lanes;
}

// Of the lanes of a, then those of b, the ones with these numbers.
template <typename V, int... lanes>
inline V pick_lanes(V a, V b, std::integer_sequence<int, lanes...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lanes...);
#else
  return __builtin_shuffle(a, b, Truth<V>{lanes...});
#endif
}

// Swaps what is above and below the diagonal of the blocks of `half` by `half` lanes, then of smaller ones.
template <int half, typename V, int L, int... lane>
inline void transpose_lanes(V (&x)[L], std::integer_sequence<int, lane...> lanes) {
  XBN_UNROLL
  for (int r = 0; r < L; ++r) {
    if (r & half) continue;
    const V a = x[r], b = x[r + half];
    x[r] = pick_lanes(a, b, std::integer_sequence<int, (lane & half ? L + lane - half : lane)...>());
    x[r + half] = pick_lanes(a, b, std::integer_sequence<int, (lane & half ? L + lane : lane + half)...>());
  }
  if constexpr (half > 1) transpose_lanes<half / 2>(x, lanes);
}

// Lane r is what f makes of the lanes of x[r], from the first to the last.
template <typename V, int L, typename F>
inline V fold_lanes(V (&x)[L], const F& f) {
  transpose_lanes<L / 2>(x, std::make_integer_sequence<int, L>());
  V all = x[0];
  XBN_UNROLL
  for (int i = 1; i < L; ++i) all = f(all, x[i]);
  return all;
}

// to [columns][rows] = from [rows][columns]; the strides are from row to row.
template <typename T>
inline void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int L = kLanes<T>;
  const int64_t whole = columns / L * L;
  int64_t i = 0;
  for (; i + L <= rows; i += L) {
    for (int64_t j = 0; j < whole; j += L) {
      Lanes<T> x[L];
      XBN_UNROLL
      for (int r = 0; r < L; ++r) x[r] = load_lanes(from + (i + r) * from_stride + j);
      transpose_lanes<L / 2>(x, std::make_integer_sequence<int, L>());
      XBN_UNROLL
      for (int r = 0; r < L; ++r) store_lanes(to + (j + r) * to_stride + i, x[r]);
    }
  }
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t j = k < i ? whole : 0; j < columns; ++j) to[j * to_stride + k] = from[k * from_stride + j];
}
