// The ops that keep the bank: its filter and map, its rows. Their kernels: cpu/NAME.cpp, cuda/NAME.cu; of track_ in
// cuda/moments.cu.
#pragma once

#include "batch.h"

namespace xbn::glue {

// A bank with a pending map, as the ops that rewrite it take it.
struct MappedBank {
  MappedBank(const Contract& c, const Tensor& bank_, const Tensor& sums_, const Tensor& scale_, const Tensor& shift_,
             const Tensor& count_)
      : bank(bank_), sums(sums_), scale(scale_), shift(shift_), count(count_) {
    c.bank("bank", bank);
    const int64_t D = bank.size(1);
    c.statistic("sums", sums, "[2, D]", {2, D});
    c.statistic("scale", scale, "[D]", {D});
    c.statistic("shift", shift, "[D]", {D});
    c.counter("count", count);
  }

  // What is written shares no memory with itself, nor with what else is read.
  void check_apart_from(const char* op, std::vector<Argument> read = {}) const {
    read.insert(read.begin(), {"count", count});
    check_apart(op, {{"bank", bank}, {"sums", sums}, {"scale", scale}, {"shift", shift}}, read);
  }

  template <typename S>
  TransformParams<S> params(Type<S> type) const {
    TransformParams<S> p;
    p.bank = data_of(bank, type);
    p.sums = sums.mutable_data_ptr<double>();
    p.scale = scale.mutable_data_ptr<double>();
    p.shift = shift.mutable_data_ptr<double>();
    p.count = count.const_data_ptr<int64_t>();
    p.M = bank.size(0);
    p.D = bank.size(1);
    p.step = nullptr;
    return p;
  }

  template <typename S>
  StandardizeParams<S> standardize_params(Type<S> type, double eps, const OptionalTensor& ring_sums = {},
                                          const OptionalTensor& ring_count = {}) const {
    return {params(type), ring_sums.value_or(sums).template const_data_ptr<double>(),
            ring_count.value_or(count).template const_data_ptr<int64_t>(), eps};
  }

  const Tensor bank, sums, scale, shift, count;
};

template <typename Device>
void transform(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count) {
  const MappedBank m(Contract("transform_", bank), bank, sums, scale, shift, count);
  m.check_apart_from("transform_");
  const Device device("transform_", bank);
  device.check_counter("count", count, bank.size(0));
  dispatch_bank(bank, [&](auto type) { device.run([&](const auto& on) { return transform(m.params(type), on); }); });
}

template <typename Device>
void standardize(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, double eps,
                 const OptionalTensor& ring_sums, const OptionalTensor& ring_count) {
  const Contract c("standardize_", bank);
  const MappedBank m(c, bank, sums, scale, shift, count);
  c.eps(eps);
  c.require(ring_sums.has_value() == ring_count.has_value(), "ring_sums and ring_count go together");
  if (ring_sums) c.statistic("ring_sums", *ring_sums, "[2, D]", {2, bank.size(1)});
  if (ring_count) c.counter("ring_count", *ring_count);
  m.check_apart_from("standardize_", {{"ring_sums", ring_sums}, {"ring_count", ring_count}});
  const Device device("standardize_", bank);
  device.check_counter("count", count, bank.size(0));
  dispatch_bank(bank, [&](auto type) {
    const auto p = m.standardize_params(type, eps, ring_sums, ring_count);
    device.run([&](const auto& on) { return standardize(p, on); });
  });
}

// What the filter knows and writes, and the bank's moments.
struct FilterState {
  Tensor target_mean, target_std, variance;
  OptionalTensor innovation;
  Tensor scale, shift, sums, count;
  OptionalTensor stats;
  const char* stats_name = "stats";  // as the op calls them
};

struct FilterOptions {
  std::optional<double> process_noise;  // none: it is estimated
  double measurement_noise;
  std::optional<double> fixed_gain;
  double eps;
};

struct Tracking {
  Tracking(const Contract& c, int64_t D, const FilterState& state, const FilterOptions& options)
      : s(state), o(options) {
    c.statistic("target_mean", s.target_mean, "[D]", {D});
    c.statistic("target_std", s.target_std, "[D]", {D});
    c.statistic("variance", s.variance, "a scalar", {});
    if (s.innovation) c.statistic("innovation", *s.innovation, "[D]", {D});
    c.statistic("scale", s.scale, "[D]", {D});
    c.statistic("shift", s.shift, "[D]", {D});
    c.statistic("sums", s.sums, "[2, D]", {2, D});
    c.counter("count", s.count);
    if (s.stats) c.statistic(s.stats_name, *s.stats, "[3]", {3});
    c.require(o.process_noise || s.innovation, "without a process_noise an innovation is needed");
    c.require(!o.process_noise || *o.process_noise >= 0, "process_noise must not be negative, got ",
              o.process_noise.value_or(0));
    c.require(o.measurement_noise > 0 && std::isfinite(o.measurement_noise),
              "measurement_noise must be positive and finite, got ", o.measurement_noise);
    c.require(!o.fixed_gain || (*o.fixed_gain >= 0 && *o.fixed_gain <= 1), "fixed_gain must be within [0, 1]");
    c.eps(o.eps);
  }

  std::vector<Argument> written() const {
    return {{"target_mean", s.target_mean}, {"target_std", s.target_std}, {"variance", s.variance},
            {"innovation", s.innovation},   {"scale", s.scale},           {"shift", s.shift},
            {s.stats_name, s.stats}};
  }

  TrackParams params() const {
    TrackParams p;
    p.target_mean = s.target_mean.mutable_data_ptr<double>();
    p.target_std = s.target_std.mutable_data_ptr<double>();
    p.variance = s.variance.mutable_data_ptr<double>();
    p.innovation = o.process_noise ? nullptr : data_of<double>(s.innovation);
    p.scale = s.scale.mutable_data_ptr<double>();
    p.shift = s.shift.mutable_data_ptr<double>();
    p.sums = s.sums.const_data_ptr<double>();
    p.count = s.count.const_data_ptr<int64_t>();
    p.D = s.target_mean.size(0);
    p.process_noise = o.process_noise.value_or(0);
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
           const OptionalTensor& mask, const Tensor& sums, const Tensor& count, std::optional<double> process_noise,
           double measurement_noise, std::optional<double> fixed_gain, double eps, OptionalTensor stats,
           OptionalTensor innovation) {
  const Contract c("track_", x);
  const Measurement m(c, x, mask);
  const Tracking t(c, x.size(1), {target_mean, target_std, variance, innovation, scale, shift, sums, count, stats},
                   {process_noise, measurement_noise, fixed_gain, eps});
  check_apart("track_", t.written(), {{"x", m.x}, {"mask", m.mask.tensor}, {"sums", sums}, {"count", count}});
  const Device device("track_", m.x);
  device.check_counter("count", count, INT64_MAX);
  dispatch(x, [&](auto type) { device.run([&](const auto& on) { return track(m.params(type), t.params(), on); }); });
}

// The ring, or the slots of one from `first` on. All its tensors are written.
struct Ring {
  Tensor bank, bank_labels, sums, head, count;
  OptionalTensor bank_ids, bank_steps;
  int64_t first = 0;
  std::optional<int64_t> ring_size = {};  // none: the bank is all of it

  int64_t size() const { return ring_size.value_or(bank.size(0)); }
};

// What is read besides the batch.
struct Stored {
  Tensor labels;
  OptionalTensor mask;
  Tensor scale, shift;
  OptionalTensor ids, step;
};

// A batch to be stored, its operands dense, and room for where its rows went.
struct Storing {
  Storing(const Contract& c, const Ring& ring, const Tensor& batch, const Stored& stored) : r(ring), s(stored) {
    c.bank("bank", r.bank);
    const int64_t M = r.bank.size(0), D = r.bank.size(1);
    c.require(M > 0 || r.ring_size, "bank must have at least one row");
    c.require(r.first >= 0, "first must not be negative, got ", r.first);
    c.require(r.size() > 0 && M <= r.size() && r.first <= r.size() - M, "ring_size must have room for M = ", M,
              " slots from first = ", r.first, " on, got ", r.size());
    c.labels("bank_labels", r.bank_labels, "[M]", M);
    c.contiguous("bank_labels", r.bank_labels);
    c.statistic("sums", r.sums, "[2, D]", {2, D});
    c.counter("head", r.head);
    c.counter("count", r.count);
    c.matrix("z", batch, "[B, D]", {-1, D});
    const int64_t B = batch.size(0);
    c.labels("labels", s.labels, "[B]", B);
    c.rows_mask("mask", s.mask, B);
    c.statistic("scale", s.scale, "[D]", {D});
    c.statistic("shift", s.shift, "[D]", {D});
    for (const auto& [name, t] : {std::pair("bank_ids", &r.bank_ids), std::pair("bank_steps", &r.bank_steps)}) {
      if (!*t) continue;
      c.labels(name, **t, "[M]", M);
      c.contiguous(name, **t);
    }
    c.require(r.bank_ids.has_value() || !s.ids, "ids need bank_ids to be stored in");
    if (s.ids) c.labels("ids", *s.ids, "[B]", B);
    c.require(r.bank_steps.has_value() == s.step.has_value(), "bank_steps and step go together");
    if (s.step) c.counter("step", *s.step);
    z = as_dense(batch);
    labels = as_dense(s.labels);
    ids = Dense(s.ids);
    mask = Dense(s.mask);
    slots = torch::stable::new_empty(labels, {B});
  }

  std::vector<Argument> written() const {
    return {{"bank", r.bank},
            {"bank_labels", r.bank_labels},
            {"sums", r.sums},
            {"head", r.head},
            {"count", r.count},
            {"bank_ids", r.bank_ids},
            {"bank_steps", r.bank_steps}};
  }

  template <typename T, typename S>
  EnqueueParams<T, S> params(Type<T> type, Type<S> bank_type) const {
    EnqueueParams<T, S> p;
    p.bank = data_of(r.bank, bank_type);
    p.bank_labels = r.bank_labels.mutable_data_ptr<int64_t>();
    p.bank_ids = data_of<int64_t>(r.bank_ids);
    p.bank_steps = data_of<int64_t>(r.bank_steps);
    p.sums = r.sums.mutable_data_ptr<double>();
    p.head = r.head.mutable_data_ptr<int64_t>();
    p.count = r.count.mutable_data_ptr<int64_t>();
    p.z = data_in(z, type);
    p.labels = labels.const_data_ptr<int64_t>();
    p.ids = ids.data<int64_t>();
    p.step = data_in<int64_t>(s.step);
    p.mask = mask.data<bool>();
    p.scale = s.scale.const_data_ptr<double>();
    p.shift = s.shift.const_data_ptr<double>();
    p.slots = slots.mutable_data_ptr<int64_t>();
    p.B = z.size(0);
    p.M = r.size();
    p.D = r.bank.size(1);
    p.first = r.first;
    p.rows = r.bank.size(0);
    return p;
  }

  const Ring r;
  const Stored s;
  Tensor z, labels;
  Dense ids, mask;
  Tensor slots;
};

template <typename Device>
Tensor enqueue(Tensor bank, Tensor bank_labels, Tensor sums, Tensor head, Tensor count, const Tensor& z,
               const Tensor& labels, const OptionalTensor& mask, const Tensor& scale, const Tensor& shift,
               OptionalTensor bank_ids, const OptionalTensor& ids, OptionalTensor bank_steps,
               const OptionalTensor& step, int64_t first, std::optional<int64_t> ring_size) {
  const Contract c("enqueue_", bank);
  const Storing s(c, {bank, bank_labels, sums, head, count, bank_ids, bank_steps, first, ring_size}, z,
                  {labels, mask, scale, shift, ids, step});
  check_apart("enqueue_", s.written(),
              {{"z", s.z},
               {"labels", s.labels},
               {"ids", s.ids.tensor},
               {"mask", s.mask.tensor},
               {"scale", scale},
               {"shift", shift},
               {"step", step}});
  const Device device("enqueue_", bank);
  device.check_counter("head", head, s.r.size() - 1);
  device.check_counter("count", count, s.r.size());
  dispatch(z, bank, [&](auto type, auto bank_type) {
    device.run([&](const auto& on) { return enqueue(s.params(type, bank_type), on); });
  });
  return s.slots;
}

template <typename Device, typename Library>
void register_bank_ops(Library& m) {
  m.impl("track_", TORCH_BOX(&xbn::glue::track<Device>));
  m.impl("transform_", TORCH_BOX(&xbn::glue::transform<Device>));
  m.impl("standardize_", TORCH_BOX(&xbn::glue::standardize<Device>));
  m.impl("enqueue_", TORCH_BOX(&xbn::glue::enqueue<Device>));
}

}  // namespace xbn::glue
