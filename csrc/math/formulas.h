// The scalar formulas of the method, written once and called by every kernel on every device.
// xbn_ext/reference/ states the same formulas in PyTorch; the tests hold the two side by side.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define XBN_FORMULA __host__ __device__ __forceinline__
#define XBN_KERNEL_FORMULA __device__ __forceinline__  // calls a function of a kernel
#else
#define XBN_FORMULA inline __attribute__((always_inline))
#define XBN_KERNEL_FORMULA XBN_FORMULA
#endif

namespace xbn {

XBN_FORMULA constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
XBN_FORMULA constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether row i is one of those in a mask; without one all are.
XBN_FORMULA bool is_marked(const bool* mask, int64_t i) { return mask == nullptr || mask[i]; }

XBN_FORMULA double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

XBN_FORMULA double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// --- Rows of unit length -------------------------------------------------------------------------
// A row whose norm is NaN counts as a long one, so that whatever is made of it is NaN, too.

template <typename T>
XBN_FORMULA bool is_short(T norm, T eps) {
  return norm < eps;
}

// What a row is divided by.
template <typename T>
XBN_FORMULA T length(T norm, T eps) {
  return is_short(norm, eps) ? eps : norm;
}

template <typename T>
XBN_FORMULA T inverse_length(T norm, T eps) {
  return T(1) / length(norm, eps);
}

// What of a gradient is along a row z, in z's: (g z) / (z z); NaN where one of them is no number. The rest, across it,
// is what turns the row.
XBN_FORMULA double part_along(double product, double squared) { return squared > 0.0 ? product / squared : squared; }

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

// The gain of the next step, where no process noise is given. Innovations of a filter with the best gain are white: with
// too small a gain each resembles the last, with too large a one it opposes it, and their lag-one correlation is the
// best gain minus the present one (Mehra, 1970, of a random walk). A tenth of what one pair of them says is taken over.
// The gain never reaches 1, for which the variance would be infinite.

struct Innovations {  // of the mean, summed over the dimensions
  double product;     // of the innovation and the one before
  double squared, squared_before;
};

XBN_FORMULA double adapted_gain(double gain, Innovations i) {
  constexpr double kRate = 0.1, kLeast = 0.1, kMost = 0.999;
  const double size = std::sqrt(i.squared) * std::sqrt(i.squared_before);
  gain += size > 0.0 ? kRate * (i.product / size) : 0.0;
  return gain < kLeast ? kLeast : gain > kMost ? kMost : gain;
}

// The prior variance by which that will be the Kalman gain.
XBN_FORMULA double adapted_variance(KalmanGain k, double measurement_noise, Innovations i) {
  const double gain = adapted_gain(k.gain, i);
  return measurement_noise * gain / (1.0 - gain);
}

// What a batch measured before anything was known is no innovation.
XBN_FORMULA double innovation_of(double state, double measured, double variance) {
  return std::isfinite(variance) ? measured - state : 0.0;
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

// Moments of `count` stored rows; an empty bank counts as standardised. Where the mean is far larger than the spread,
// the difference above is rounding: a spread that the sums cannot tell from it counts as none.
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

// The distance over all dimensions; NaN where the batch measures nothing or the bank is empty.
XBN_FORMULA double moment_gap(double squared_gaps, int64_t rows, int64_t count) {
  return rows < 2 || count == 0 ? static_cast<double>(NAN) : std::sqrt(squared_gaps);
}

// Of rows with the moments `stored`, after a map.
XBN_FORMULA Moments moved(Moments stored, Affine map) {
  return {map.scale * stored.mean + map.shift, std::fabs(map.scale) * stored.std};
}

// The pending map, followed by the one that gives the stored rows the moments `target`.
XBN_FORMULA Affine follow(Affine pending, Moments stored, Moments target, double eps) {
  const Affine map = match_moments(moved(stored, pending), target, eps);
  return {map.scale * pending.scale, map.scale * pending.shift + map.shift};
}

// Squared distance of two normal distributions with these moments (2-Wasserstein), in one dimension.
XBN_FORMULA double squared_gap(Moments a, Moments b) {
  return (a.mean - b.mean) * (a.mean - b.mean) + (a.std - b.std) * (a.std - b.std);
}

// Whether a dimension has a spread, or none to speak of; neither where it is no number.
XBN_FORMULA bool is_live(Moments stored, double scale, double eps) { return std::fabs(scale) * stored.std >= eps; }
XBN_FORMULA bool is_dead(Moments stored, double scale, double eps) { return std::fabs(scale) * stored.std < eps; }

// Of a dead dimension, whether the scale is so far from 1 that 16 bits would not hold what comes when it lives again.
XBN_FORMULA bool off_unit(double scale) { return !(std::fabs(scale) >= 1.0 / 64 && std::fabs(scale) <= 64.0); }

// Whether stored coordinates should be standardised again: they are far from mean 0 and standard deviation 1; or the
// dimension is dead, and has the scale with which it died.
XBN_FORMULA bool off_standard(Moments stored, double scale, double eps) {
  if (!is_live(stored, scale, eps)) return is_dead(stored, scale, eps) && off_unit(scale);
  return std::fabs(stored.mean) > 4.0 || stored.std > 4.0 || stored.std < 0.25;
}

// What takes stored coordinates there: of a dead dimension to a scale of 1. Rounded to C as the rows are computed, so
// that the map undoes just that.
template <typename C>
XBN_FORMULA Affine to_standard(Moments stored, double scale, double eps) {
  const bool live = is_live(stored, scale, eps);
  if (!live && !off_standard(stored, scale, eps)) return {1.0, 0.0};
  const double a = static_cast<double>(static_cast<C>(live ? 1.0 / stored.std : scale));
  return {a, static_cast<double>(static_cast<C>(-stored.mean * a))};
}

// --- Ids and the ring ------------------------------------------------------------------------------------

// Neither of these is an id. A GPU's kernels give the first to rows without one and the second to such anchors, so that
// the two differ and a pair needs one comparison.
constexpr int64_t kRowWithoutId = -1, kAnchorWithoutId = INT64_MIN;

XBN_FORMULA bool is_id(int64_t id) { return id != kRowWithoutId && id != kAnchorWithoutId; }

// The id that row i of a batch has in its slot: that of its sample or, where it has none, one no other row has; of slot
// -1, no slot, none.
XBN_FORMULA int64_t stored_id(const int64_t* ids, int64_t i, int64_t slot) {
  return ids != nullptr && ids[i] >= 0 ? ids[i] : -2 - slot;
}

}  // namespace xbn
