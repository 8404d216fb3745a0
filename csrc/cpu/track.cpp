// track: one step of the filter on the moments of the embeddings, then the affine map that gives the bank
// the filtered moments, composed into the map that is pending on the bank.
//
//   in       mean, std [D] measured on a batch of `rows` rows; sums [2, D], count of the stored rows
//   in, out  target_mean, target_std [D], variance [1]; scale, shift [D]
//   math     formulas.h: filter_step, kalman_state, bank_moments, follow
#include "track.h"

#include <cmath>

#include "../formulas.h"

namespace xbn {

void track(const TrackParams& p) {
  const int64_t count = *p.count;
  const KalmanGain k = filter_step(*p.variance, *p.rows, p.process_noise, p.measurement_noise, p.fixed_gain);
  *p.variance = k.variance;
  for (int64_t d = 0; d < p.D; ++d) {
    p.target_mean[d] = kalman_state(p.target_mean[d], p.mean[d], k.gain);
    p.target_std[d] = kalman_state(p.target_std[d], p.std[d], k.gain);
  }
  if (!std::isfinite(k.variance)) return;  // nothing is known, so there is nothing to match
  for (int64_t d = 0; d < p.D; ++d) {
    const Moments stored = bank_moments(p.sums[d], p.sums[p.D + d], count);
    const Affine map = follow({p.scale[d], p.shift[d]}, stored, {p.target_mean[d], p.target_std[d]}, p.eps);
    p.scale[d] = map.scale;
    p.shift[d] = map.shift;
  }
}

}  // namespace xbn
