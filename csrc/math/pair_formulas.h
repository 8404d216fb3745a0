// What a loss says of a pair, of one or of several side by side: V is a number or, on the CPU, a vector of the
// compiler's. So they are written without branches. Comparisons are written so that a NaN similarity counts: it reaches
// the loss, as it does in PyTorch.
//
// It includes nothing, and only the names have an include guard: program.h includes it in namespace xbn, and
// memory_loss_kernel.h and batch_loss_kernel.h once more for each instruction set, since a function of vectors is no good
// unless it is compiled for theirs.

#ifndef XBN_FORMULAS_HAVE_NAMES
#define XBN_FORMULAS_HAVE_NAMES

// The last four are no functions of a pair's similarity alone: the kernels have them.
enum class Formula {
  margin,
  distance,
  similarity,
  ntxent,
  weighted,
  exponent,
  circle,
  sigmoid,
  extreme,
  threshold,
  rank,
  weigh
};

// Of these a slot adds up e^x.
XBN_FORMULA constexpr bool is_exponential(Formula formula) {
  return formula == Formula::exponent || formula == Formula::circle;
}

#endif

// What a comparison gives: a bool; of vectors, for each lane an integer, -1 or 0.
template <typename V>
using Truth = decltype(V() < V());

// The number a V is made of, and unsigned integers of its size.
template <typename V>
struct LaneOf {
  using type = std::remove_cv_t<std::remove_reference_t<decltype(V()[0])>>;
};
template <>
struct LaneOf<float> {
  using type = float;
};
template <>
struct LaneOf<double> {
  using type = double;
};
template <typename V>
struct BitsOf {
#if !defined(__CUDACC__)
  typedef std::conditional_t<sizeof(typename LaneOf<V>::type) == 4, uint32_t, uint64_t> type
      __attribute__((vector_size(sizeof(V))));
#endif
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// e^x for x <= 0 to about a unit in the last place; 0 where e^x is too small for a normal number. x = n log 2 + r: the
// Taylor series of e^r with |r| <= log(2) / 2, times 2^n by way of its bits.
template <typename V>
XBN_FORMULA V exp_of_negative(V x) {
  typename BitsOf<V>::type bits;
  V sum = V(), power;
  if constexpr (std::is_same_v<typename LaneOf<V>::type, float>) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: in a sum with it the low bits are those of an integer
    const V shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    sum = sum + 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4b400000u + 127u) << 23;
    memcpy(&power, &bits, sizeof(power));
    return x < -87.0f ? V() : sum * power;
  } else {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    const V shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
    const V r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
    sum = sum + 1.0 / 6227020800;
    sum = sum * r + 1.0 / 479001600;
    sum = sum * r + 1.0 / 39916800;
    sum = sum * r + 1.0 / 3628800;
    sum = sum * r + 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4338000000000000u + 1023u) << 52;
    memcpy(&power, &bits, sizeof(power));
    return x < -708.0 ? V() : sum * power;
  }
}

// log(1 + e) for e within [0, 1] to about a unit in the last place: 2 artanh(f) with f = e / (2 + e) <= 1/3.
template <typename V>
XBN_FORMULA V log1p_of_fraction(V e) {
  using T = typename LaneOf<V>::type;
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const V f = e / (T(2) + e), q = f * f;
  V sum = V();
  for (int k = kTerms - 1; k >= 0; --k) sum = sum * q + T(2) / T(2 * k + 1);
  return sum * f;
}

// log(1 + e^x), and its derivative.
template <typename V>
struct Softplus {
  V value, derivative;
};
template <typename V>
XBN_FORMULA Softplus<V> softplus_of(V x) {
  using T = typename LaneOf<V>::type;
  const V zero = V(), one = zero + T(1), e = exp_of_negative(x > zero ? -x : x);
  return {(x > zero ? x : x <= zero ? zero : x) + log1p_of_fraction(e), (x > zero ? one : e) / (one + e)};
}

// Whether x takes the place of the extreme so far; a NaN does, and stays.
template <typename V>
XBN_FORMULA Truth<V> exceeds(V x, V so_far) {
  return ((x <= so_far) == Truth<V>()) & (so_far == so_far);
}

// A pair adds `value` and `weight` to its anchor's sums, and weight * row to its gradient.
template <typename V>
struct Score {
  V value;
  V weight;
  Truth<V> counts;  // as one of the anchor's pairs
};

// A pair adds e^x to its anchor's sum, and slope * e^x * row to its gradient. All of an anchor are scaled by e^-shift,
// shift being the largest x, so that no exponent is too large or too small.
template <typename V>
struct Exponent {
  V x;
  V slope;
  Truth<V> counts;
};

template <typename T>
struct MarginFormula {  // a: of positives, b: of negatives
  static constexpr bool kExponential = is_exponential(Formula::margin);
  static constexpr bool kSumsWeights = true;
  T a, b;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V> positive, V) const {
    const V zero = V(), one = zero + T(1), cost = positive ? a - s : s - b;
    const Truth<V> inactive = cost <= zero;
    return {inactive ? zero : cost, inactive ? zero : positive ? zero - one : one, inactive == Truth<V>()};
  }
};

template <typename V>
XBN_FORMULA V square_root(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::sqrt(x);
  } else {
    for (size_t k = 0; k < sizeof(V) / sizeof(x[0]); ++k) x[k] = std::sqrt(x[k]);
    return x;
  }
}

template <typename T>
struct DistanceFormula {  // of d = sqrt(2 - 2 s), 0 for s > 1; a: of positives, b: of negatives; no weight where d is 0
  static constexpr bool kExponential = is_exponential(Formula::distance);
  static constexpr bool kSumsWeights = false;
  T a, b;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V> positive, V) const {
    const V zero = V(), one = zero + T(1), square = T(2) - T(2) * s;
    const V d = square_root(square <= zero ? zero : square), cost = positive ? d - a : b - d;
    const V slope = d <= zero ? zero : one / d;
    const Truth<V> inactive = cost <= zero;
    return {inactive ? zero : cost, inactive ? zero : positive ? -slope : slope, inactive == Truth<V>()};
  }
};

template <typename T>
struct SimilarityFormula {  // the value rounds as the exponent a s does, so that an only pair cancels its own sum
  static constexpr bool kExponential = is_exponential(Formula::similarity);
  static constexpr bool kSumsWeights = false;
  T a;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V>, V) const {
    return {a * s, V() + T(1), V() == V()};
  }
};

template <typename T>
struct NTXentFormula {  // given: the log of the sum of e^(a s) over the negatives
  static constexpr bool kExponential = is_exponential(Formula::ntxent);
  static constexpr bool kSumsWeights = true;
  T a;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V>, V given) const {
    const Softplus<V> cost = softplus_of(given - a * s);
    return {cost.value, cost.derivative, V() == V()};
  }
};

template <typename T>
struct WeightedFormula {  // given: the log of the mean of e^(a s); a weight is 2 less what e^(a s) is to that mean
  static constexpr bool kExponential = is_exponential(Formula::weighted);
  static constexpr bool kSumsWeights = false;
  T a;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V>, V given) const {
    // No pair that is in the mean is as much as e^60 of it. One of an anchor that pays nothing may be.
    const V zero = V(), most = zero + T(60), one = zero + T(1), x = a * s - given, up = x > most ? most : x;
    const V e = exp_of_negative(up > zero ? -up : up), more = one - (up > zero ? one / e : e);
    return {s + more * s, one + more, zero == zero};  // no product is left to be fused with the sum, or not
  }
};

template <typename T>
struct SigmoidFormula {  // x = a s + b; a positive costs log(1 + e^-x), a negative log(1 + e^x)
  static constexpr bool kExponential = is_exponential(Formula::sigmoid);
  static constexpr bool kSumsWeights = true;
  T a, b;
  template <typename V>
  XBN_FORMULA Score<V> operator()(V s, Truth<V> positive, V) const {
    const V x = a * s + b;
    const Softplus<V> cost = softplus_of(positive ? -x : x);
    return {cost.value, positive ? -cost.derivative : cost.derivative, V() == V()};
  }
};

template <typename T>
struct ExponentFormula {  // x = a s
  static constexpr bool kExponential = is_exponential(Formula::exponent);
  T a;
  bool mined;
  template <typename V>
  XBN_FORMULA Exponent<V> operator()(V s, Truth<V> positive, V given) const {
    const Truth<V> easy = positive ? s >= given : s <= given, none = Truth<V>();
    return {a * s, V() + a, (mined ? easy : none) == none};
  }
};

template <typename T>
struct CircleFormula {  // a: m, b: gamma; the slope takes the self-paced factor for a constant
  static constexpr bool kExponential = is_exponential(Formula::circle);
  T a, b;
  template <typename V>
  XBN_FORMULA Exponent<V> operator()(V s, Truth<V> positive, V) const {
    const V zero = V(), distance = positive ? T(1) + a - s : s + a;
    const V pace = distance <= zero ? zero : b * distance;
    return {positive ? -pace * (s - (T(1) - a)) : pace * (s - a), positive ? -pace : pace, zero == zero};
  }
};

// Calls f with the functor of a slot's formula, which is one of scores or of exponents; of the other formulas it does
// nothing.
template <typename T, typename F>
XBN_KERNEL_FORMULA void with_formula(const Slot& slot, const F& f) {
  const T a = static_cast<T>(slot.a), b = static_cast<T>(slot.b);
  switch (slot.formula) {
    case Formula::margin: return f(MarginFormula<T>{a, b});
    case Formula::distance: return f(DistanceFormula<T>{a, b});
    case Formula::similarity: return f(SimilarityFormula<T>{a});
    case Formula::ntxent: return f(NTXentFormula<T>{a});
    case Formula::weighted: return f(WeightedFormula<T>{a});
    case Formula::exponent: return f(ExponentFormula<T>{a, slot.mined});
    case Formula::circle: return f(CircleFormula<T>{a, b});
    case Formula::sigmoid: return f(SigmoidFormula<T>{a, b});
    case Formula::extreme:
    case Formula::threshold:
    case Formula::rank:
    case Formula::weigh: return;
  }
}
