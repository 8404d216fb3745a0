// track: one step of the filter on the moments of the embeddings, then the affine map that gives the bank
// the filtered moments, composed into the map that is pending on the bank.
//
//   in       mean, std [D] measured on a batch of `rows` rows; sums [2, D], count of the stored rows
//   in, out  target_mean, target_std [D], variance [1], innovation [D] or null; scale, shift [D]
//   out      stats [3]: the gap between the moments of bank and batch before and after the map, the gain; or null
//   math     formulas.h: filter_step, kalman_state, adapted_variance, bank_moments, follow, moment_gap
#include <cmath>

#include "../kernels.h"
#include "../math/formulas.h"
#include "cpu.h"

namespace xbn {

template <typename T>
void track(const MomentsParams<T>& measured, const TrackParams& p, const Cpu& cpu) {
  moments(measured, cpu);
  const int64_t count = *p.count;
  const KalmanGain k = filter_step(*p.variance, *measured.rows, p.process_noise, p.measurement_noise, p.fixed_gain);
  const bool known = std::isfinite(k.variance);  // if nothing is, there is nothing to match
  const bool adapts = p.innovation != nullptr && *measured.rows >= 2 && !p.only_measures;
  double before = 0, after = 0;
  Innovations innovations{};
  for (int64_t d = 0; d < p.D; ++d) {
    const Moments stored = bank_moments(p.sums[d], p.sums[p.D + d], count), batch = {measured.mean[d], measured.std[d]};
    const Moments target = {kalman_state(p.target_mean[d], batch.mean, k.gain),
                            kalman_state(p.target_std[d], batch.std, k.gain)};
    const Affine pending = {p.scale[d], p.shift[d]};
    const Affine map = known ? follow(pending, stored, target, p.eps) : pending;
    before += squared_gap(moved(stored, pending), batch);
    after += squared_gap(moved(stored, map), batch);
    if (p.only_measures) continue;
    if (adapts) {
      const double innovation = innovation_of(p.target_mean[d], batch.mean, *p.variance);
      innovations.product += innovation * p.innovation[d];
      innovations.squared += innovation * innovation;
      innovations.squared_before += p.innovation[d] * p.innovation[d];
      p.innovation[d] = innovation;
    }
    p.target_mean[d] = target.mean;
    p.target_std[d] = target.std;
    p.scale[d] = map.scale;
    p.shift[d] = map.shift;
  }
  if (!p.only_measures) *p.variance = adapts ? adapted_variance(k, p.measurement_noise, innovations) : k.variance;
  if (p.stats == nullptr) return;
  p.stats[0] = moment_gap(before, *measured.rows, count);
  p.stats[1] = moment_gap(after, *measured.rows, count);
  p.stats[2] = k.gain;
}

template void track(const MomentsParams<float>&, const TrackParams&, const Cpu&);
template void track(const MomentsParams<double>&, const TrackParams&, const Cpu&);

}  // namespace xbn
