// track_ between torch and its kernel.
#pragma once

#include "moments.h"

namespace xbn::glue {

// What the filter knows and writes, and the bank's moments.
struct FilterState {
  Tensor target_mean, target_std, variance, scale, shift, sums, count;
  OptionalTensor stats;
  const char* stats_name = "stats";  // as the op calls them
};

struct FilterOptions {
  double process_noise, measurement_noise;
  std::optional<double> fixed_gain;
  double eps;
};

struct Tracking {
  Tracking(const Contract& c, int64_t D, const FilterState& state, const FilterOptions& options)
      : s(state), o(options) {
    c.statistic("target_mean", s.target_mean, "[D]", {D});
    c.statistic("target_std", s.target_std, "[D]", {D});
    c.statistic("variance", s.variance, "a scalar", {});
    c.statistic("scale", s.scale, "[D]", {D});
    c.statistic("shift", s.shift, "[D]", {D});
    c.statistic("sums", s.sums, "[2, D]", {2, D});
    c.counter("count", s.count);
    if (s.stats) c.statistic(s.stats_name, *s.stats, "[3]", {3});
    c.require(o.process_noise >= 0, "process_noise must not be negative, got ", o.process_noise);
    c.require(o.measurement_noise > 0 && std::isfinite(o.measurement_noise),
              "measurement_noise must be positive and finite, got ", o.measurement_noise);
    c.require(!o.fixed_gain || (*o.fixed_gain >= 0 && *o.fixed_gain <= 1), "fixed_gain must be within [0, 1]");
    c.eps(o.eps);
  }

  std::vector<Argument> written() const {
    return {{"target_mean", s.target_mean},
            {"target_std", s.target_std},
            {"variance", s.variance},
            {"scale", s.scale},
            {"shift", s.shift},
            {s.stats_name, s.stats}};
  }

  TrackParams params() const {
    TrackParams p;
    p.target_mean = s.target_mean.mutable_data_ptr<double>();
    p.target_std = s.target_std.mutable_data_ptr<double>();
    p.variance = s.variance.mutable_data_ptr<double>();
    p.scale = s.scale.mutable_data_ptr<double>();
    p.shift = s.shift.mutable_data_ptr<double>();
    p.sums = s.sums.const_data_ptr<double>();
    p.count = s.count.const_data_ptr<int64_t>();
    p.D = s.target_mean.size(0);
    p.process_noise = o.process_noise;
    p.measurement_noise = o.measurement_noise;
    p.fixed_gain = o.fixed_gain.value_or(-1.0);
    p.eps = o.eps;
    p.only_measures = false;
    p.stats = data_of<double>(s.stats);
    return p;
  }

  const FilterState s;
  const FilterOptions o;
};

template <typename Device>
void track(Tensor target_mean, Tensor target_std, Tensor variance, Tensor scale, Tensor shift, const Tensor& x,
           const OptionalTensor& mask, const Tensor& sums, const Tensor& count, double process_noise,
           double measurement_noise, std::optional<double> fixed_gain, double eps, OptionalTensor stats) {
  const Contract c("track_", x);
  const Measurement m(c, x, mask);
  const Tracking t(c, x.size(1), {target_mean, target_std, variance, scale, shift, sums, count, stats},
                   {process_noise, measurement_noise, fixed_gain, eps});
  check_apart("track_", t.written(), {{"x", m.x}, {"mask", m.mask.tensor}, {"sums", sums}, {"count", count}});
  const Device device("track_", m.x);
  device.check_counter("count", count, INT64_MAX);
  dispatch(x, [&](auto type) { device.run([&](const auto& on) { return track(m.params(type), t.params(), on); }); });
}

}  // namespace xbn::glue
