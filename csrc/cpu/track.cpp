// track: one step of the filter on the moments of the embeddings, then the affine map that gives the bank
// the filtered moments, composed into the map that is pending on the bank.
//
//   in       mean, std [D] measured on a batch of `rows` rows; sums [2, D], count of the stored rows
//   in, out  target_mean, target_std [D], variance [1]; scale, shift [D]
//   math     formulas.h: kalman_gain, kalman_state, moments_from_sums, match_moments
#include "track.h"

#include <cmath>

#include "../formulas.h"

namespace xbn {

void track(const TrackParams& p) {
  double variance = *p.variance + p.process_noise;
  if (*p.rows >= 2) {
    const KalmanGain k = kalman_gain(variance, p.measurement_noise, p.fixed_gain);
    for (int64_t d = 0; d < p.D; ++d) {
      p.target_mean[d] = kalman_state(p.target_mean[d], p.mean[d], k.gain);
      p.target_std[d] = kalman_state(p.target_std[d], p.std[d], k.gain);
    }
    variance = k.variance;
  }
  *p.variance = variance;
  if (!std::isfinite(variance)) return;  // nothing is known, so there is nothing to match

  const double count = static_cast<double>(*p.count);
  for (int64_t d = 0; d < p.D; ++d) {
    Moments stored = {0.0, 1.0};
    if (count > 0) stored = moments_from_sums(p.sums[d], p.sums[p.D + d], count);
    const Moments now = {p.scale[d] * stored.mean + p.shift[d], std::fabs(p.scale[d]) * stored.std};
    const Affine map = match_moments(now, {p.target_mean[d], p.target_std[d]}, p.eps);
    p.scale[d] = map.scale * p.scale[d];
    p.shift[d] = map.scale * p.shift[d] + map.shift;
  }
}

}  // namespace xbn
