// track_ between torch and its kernel.
#pragma once

#include "moments.h"

namespace xbn::glue {

template <typename Device>
void track(Tensor target_mean, Tensor target_std, Tensor variance, Tensor scale, Tensor shift, const Tensor& x,
           const OptionalTensor& mask, const Tensor& sums, const Tensor& count, double process_noise,
           double measurement_noise, std::optional<double> fixed_gain, double eps, OptionalTensor stats) {
  const Contract c("track_", x);
  const Measurement m(c, x, mask);
  const int64_t D = x.size(1);
  c.statistic("target_mean", target_mean, "[D]", {D});
  c.statistic("target_std", target_std, "[D]", {D});
  c.statistic("variance", variance, "a scalar", {});
  c.statistic("scale", scale, "[D]", {D});
  c.statistic("shift", shift, "[D]", {D});
  c.statistic("sums", sums, "[2, D]", {2, D});
  c.counter("count", count);
  if (stats) c.statistic("stats", *stats, "[3]", {3});
  check(process_noise >= 0, "track_: process_noise must not be negative, got ", process_noise);
  check(measurement_noise > 0 && std::isfinite(measurement_noise),
        "track_: measurement_noise must be positive and finite, got ", measurement_noise);
  check(!fixed_gain || (*fixed_gain >= 0 && *fixed_gain <= 1), "track_: fixed_gain must be within [0, 1]");
  c.eps(eps);
  check_apart("track_",
              {{"target_mean", target_mean},
               {"target_std", target_std},
               {"variance", variance},
               {"scale", scale},
               {"shift", shift},
               {"stats", stats}},
              {{"x", m.x}, {"mask", m.mask.tensor}, {"sums", sums}, {"count", count}});
  const Device device("track_", m.x);
  device.check_counter("count", count, INT64_MAX);
  TrackParams p;
  p.target_mean = target_mean.mutable_data_ptr<double>();
  p.target_std = target_std.mutable_data_ptr<double>();
  p.variance = variance.mutable_data_ptr<double>();
  p.scale = scale.mutable_data_ptr<double>();
  p.shift = shift.mutable_data_ptr<double>();
  p.sums = sums.const_data_ptr<double>();
  p.count = count.const_data_ptr<int64_t>();
  p.D = D;
  p.process_noise = process_noise;
  p.measurement_noise = measurement_noise;
  p.fixed_gain = fixed_gain.value_or(-1.0);
  p.eps = eps;
  p.stats = data_of<double>(stats);
  dispatch(x, [&](auto type) { device.run([&](const auto& on) { return track(m.params(type), p, on); }); });
}

}  // namespace xbn::glue
