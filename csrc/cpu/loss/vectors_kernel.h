// Compiled once per instruction set: see for_each_isa.h. The compiler's vector types.

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Lanes anywhere in an array, as the compilers' own intrinsics read and write them. A pointer to vectors that are aligned as
// their elements are would do for gcc; in a template clang forgets that they are. A memcpy makes gcc copy them twice.
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
