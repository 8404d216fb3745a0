// The scalar formulas of the method, written once and called by every kernel on every device.
// xbn_ext/reference.py states the same formulas in PyTorch; the tests hold the two side by side.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define XBN_FORMULA __host__ __device__ __forceinline__
#else
#define XBN_FORMULA inline __attribute__((always_inline))
#endif

namespace xbn {

// --- Kalman filter -------------------------------------------------------------------------------
// A scalar random walk observed with noise. Infinite variance means "nothing is known yet": the gain is
// then exactly 1 and the first measurement is taken over as it is, without a special case.

struct KalmanGain {
  double gain;      // share of the innovation that enters the state
  double variance;  // posterior variance of the state
};

// variance: prior, process noise already added. fixed_gain < 0: the Kalman gain; otherwise a constant gain.
XBN_FORMULA KalmanGain kalman_gain(double variance, double measurement_noise, double fixed_gain) {
  double gain = 1.0 / (1.0 + measurement_noise / variance);
  if (fixed_gain >= 0.0 && std::isfinite(variance)) gain = fixed_gain;
  return {gain, gain * measurement_noise};  // (1 - K) P = K r, and it stays finite when P is infinite
}

XBN_FORMULA double kalman_state(double state, double measured, double gain) {
  return state + gain * (measured - state);
}

// One step of the filter on a batch of `rows` usable rows. Fewer than two measure nothing: the gain is 0.
XBN_FORMULA KalmanGain filter_step(double variance, int64_t rows, double process_noise, double measurement_noise,
                                   double fixed_gain) {
  variance += process_noise;
  if (rows < 2) return {0.0, variance};
  return kalman_gain(variance, measurement_noise, fixed_gain);
}

// --- Moments and moment matching --------------------------------------------------------------------

struct Moments {
  double mean;
  double std;
};

// Biased moments from a sum and a sum of squares of n values, n > 0.
XBN_FORMULA Moments moments_from_sums(double sum, double sum_squares, double n) {
  const double mean = sum / n;
  const double variance = sum_squares / n - mean * mean;
  return {mean, std::sqrt(variance > 0.0 ? variance : 0.0)};
}

// Moments of `count` stored rows; an empty bank counts as standardised. Where the mean is far larger than the spread, the
// difference above is rounding: a spread that the sums cannot tell from it counts as none.
XBN_FORMULA Moments bank_moments(double sum, double sum_squares, int64_t count) {
  constexpr double kRounding = 1e-12;  // of the mean square, after adding up a million rows
  if (count == 0) return {0.0, 1.0};
  const double n = static_cast<double>(count);
  Moments m = moments_from_sums(sum, sum_squares, n);
  if (m.std * m.std <= kRounding * (sum_squares / n)) m.std = 0.0;
  return m;
}

struct Affine {
  double scale;
  double shift;
};

// The map that gives values with moments `from` the moments `to`. A dimension that is dead on either side
// (standard deviation below eps) keeps its scale, so the map can always be inverted.
XBN_FORMULA Affine match_moments(Moments from, Moments to, double eps) {
  const bool dead = from.std < eps || to.std < eps;
  const double scale = dead ? 1.0 : to.std / from.std;
  return {scale, to.mean - scale * from.mean};
}

// The pending map, followed by the one that gives the stored rows the moments `target`.
XBN_FORMULA Affine follow(Affine pending, Moments stored, Moments target, double eps) {
  const Moments now = {pending.scale * stored.mean + pending.shift, std::fabs(pending.scale) * stored.std};
  const Affine map = match_moments(now, target, eps);
  return {map.scale * pending.scale, map.scale * pending.shift + map.shift};
}

// Whether stored coordinates are so far from mean 0 and standard deviation 1 that they should be standardised anew.
XBN_FORMULA bool off_standard(Moments stored) {
  return std::fabs(stored.mean) > 4.0 || stored.std > 4.0 || stored.std < 0.25;
}

// --- Pair losses --------------------------------------------------------------------------------------
// A loss says, for a positive and for a negative pair of similarity s, what the pair adds to its anchor's
// row (`value`) and that addend's derivative by s (`weight`). The pairs of a kind are added up and multiplied by
// `reduction_factor`. Comparisons are written so that a NaN similarity counts as active: it reaches the loss, as it does
// in PyTorch.

// Positives and negatives are added up apart, because some reductions scale them apart.
enum Kind { kNegative = 0, kPositive = 1, kKinds = 2 };

// An anchor's sums over its pairs of one kind.
struct RowSums {
  double value = 0;   // pair values
  double active = 0;  // pairs with a non-zero weight
};

// What the sums of a kind are multiplied by: an average over the anchors (`mean`) or over the kind's active pairs.
XBN_FORMULA double reduction_factor(bool mean, double anchors, double active) {
  const double n = mean ? anchors : active;
  return 1.0 / (n > 1.0 ? n : 1.0);
}

template <typename T>
struct Pair {
  T value;
  T weight;
};

template <typename T>
struct Contrastive {
  T pos_margin;
  T neg_margin;

  XBN_FORMULA Pair<T> positive(T s) const {
    const T slack = pos_margin - s;
    const bool inactive = slack <= T(0);
    return {inactive ? T(0) : slack, inactive ? T(0) : T(-1)};
  }

  XBN_FORMULA Pair<T> negative(T s) const {
    const T excess = s - neg_margin;
    const bool inactive = excess <= T(0);
    return {inactive ? T(0) : excess, inactive ? T(0) : T(1)};
  }
};

}  // namespace xbn
