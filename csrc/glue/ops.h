// Every op between torch and the kernels, written once for all devices: check, allocate, fill in the params, call.
// No arithmetic here. A Device (cpu/backend.cpp, cuda/backend.cpp) is made on entry and has one function per op that
// takes the params.
#pragma once

#include "../math/half.h"
#include "../math/losses.h"
#include "../params.h"
#include "contract.h"

namespace xbn {

template <typename T>
struct Type {
  using type = T;
};

// Calls f with Type<float> or Type<double>; the contract has seen to it that there is no third.
template <typename F>
void dispatch(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f(Type<float>{});
  check(t.scalar_type() == ScalarType::Double, "unsupported dtype ", t.scalar_type());
  f(Type<double>{});
}

// The same for a bank: 16-bit ones, too.
template <typename F>
void dispatch_bank(const Tensor& bank, const F& f) {
  if (bank.scalar_type() == ScalarType::Half) return f(Type<Float16>{});
  if (bank.scalar_type() == ScalarType::BFloat16) return f(Type<BFloat16>{});
  dispatch(bank, f);
}

// torch knows a 16-bit type by another name, so the pointer goes by way of void.
template <typename S>
S* data_of(const Tensor& bank) {
  return static_cast<S*>(bank.mutable_data_ptr());
}

inline Tensor as_dense(const Tensor& t) { return torch::stable::contiguous(t); }

// An optional tensor as dense data: keeps the dense copy alive as long as its pointer is used.
struct Dense {
  explicit Dense(const OptionalTensor& t) {
    if (t) tensor = as_dense(*t);
  }
  template <typename T>
  const T* data() const {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
  }
  OptionalTensor tensor;
};

// A batch to be measured, dense, and room for its moments.
struct Measurement {
  Measurement(const Tensor& batch, const OptionalTensor& rows_mask)
      : x(as_dense(batch)),
        mask(rows_mask),
        mean(torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double)),
        std(torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double)),
        rows(torch::stable::new_empty(x, {}, ScalarType::Long)) {}

  template <typename T>
  MomentsParams<T> params() const {
    return {x.const_data_ptr<T>(),
            mask.data<bool>(),
            x.size(0),
            x.size(1),
            mean.mutable_data_ptr<double>(),
            std.mutable_data_ptr<double>(),
            rows.mutable_data_ptr<int64_t>()};
  }

  Tensor x;
  Dense mask;
  Tensor mean, std, rows;
};

// A batch to be ranked against a bank, its operands dense, and room for the results.
struct Ranking {
  Ranking(const Tensor& batch, const Tensor& batch_labels, const Tensor& bank_labels, const OptionalTensor& bank_ids,
          const OptionalTensor& excluded, const OptionalTensor& ranking, bool need_grad)
      : z(as_dense(batch)),
        labels(as_dense(batch_labels)),
        rows_labels(as_dense(bank_labels)),
        rows_ids(bank_ids),
        exclude(excluded),
        anchors(ranking),
        value(torch::stable::new_empty(z, {})),
        grad_z(torch::stable::new_empty(z, {need_grad ? z.size(0) : 0, z.size(1)})),
        pairs(torch::stable::new_empty(z, {2}, ScalarType::Double)),
        need_grad(need_grad) {}

  template <typename T, typename S>
  MemoryLossParams<T, S> params(const Tensor& bank, const OptionalTensor& count, const OptionalTensor& scale,
                                const OptionalTensor& shift, bool renormalize, double eps) const {
    MemoryLossParams<T, S> p;
    p.z = z.const_data_ptr<T>();
    p.labels = labels.const_data_ptr<int64_t>();
    p.bank = static_cast<const S*>(bank.const_data_ptr());
    p.bank_labels = rows_labels.const_data_ptr<int64_t>();
    p.count = count ? count->const_data_ptr<int64_t>() : nullptr;
    p.B = z.size(0);
    p.M = bank.size(0);
    p.D = z.size(1);
    p.scale = scale ? scale->const_data_ptr<double>() : nullptr;
    p.shift = shift ? shift->const_data_ptr<double>() : nullptr;
    p.bank_ids = rows_ids.data<int64_t>();
    p.exclude = exclude.data<int64_t>();
    p.anchors = anchors.data<bool>();
    p.renormalize = renormalize;
    p.eps = eps;
    p.loss = value.mutable_data_ptr<T>();
    p.grad_z = need_grad ? grad_z.mutable_data_ptr<T>() : nullptr;
    p.pairs = pairs.mutable_data_ptr<double>();
    return p;
  }

  Tensor z, labels, rows_labels;
  Dense rows_ids, exclude, anchors;
  Tensor value, grad_z, pairs;
  bool need_grad;
};

template <typename Device>
struct Ops {
  static std::tuple<Tensor, Tensor> normalize(const Tensor& x, double eps) {
    check_normalize(x, eps);
    const Tensor dense = as_dense(x);
    const int64_t B = x.size(0), D = x.size(1);
    const Tensor z = torch::stable::new_empty(dense, {B, D});
    const Tensor norm = torch::stable::new_empty(dense, {B}, ScalarType::Double);
    const Device device("normalize", dense);
    dispatch(x, [&](auto type) {
      using T = typename decltype(type)::type;
      device.normalize(NormalizeParams<T>{dense.const_data_ptr<T>(), B, D, eps, z.mutable_data_ptr<T>(),
                                          norm.mutable_data_ptr<double>()});
    });
    return {z, norm};
  }

  static Tensor normalize_backward(const Tensor& grad_z, const Tensor& z, const Tensor& norm, double eps) {
    check_normalize_backward(grad_z, z, norm, eps);
    const Tensor dense_grad = as_dense(grad_z), dense_z = as_dense(z);
    const int64_t B = z.size(0), D = z.size(1);
    const Tensor grad_x = torch::stable::new_empty(dense_z, {B, D});
    const Device device("normalize_backward", dense_z);
    dispatch(z, [&](auto type) {
      using T = typename decltype(type)::type;
      device.normalize_backward(NormalizeBackwardParams<T>{dense_grad.const_data_ptr<T>(), dense_z.const_data_ptr<T>(),
                                                           norm.const_data_ptr<double>(), B, D, eps,
                                                           grad_x.mutable_data_ptr<T>()});
    });
    return grad_x;
  }

  static std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& mask) {
    check_moments(x, mask);
    const Measurement m(x, mask);
    const Device device("moments", m.x);
    dispatch(x, [&](auto type) { device.moments(m.params<typename decltype(type)::type>()); });
    return {m.mean, m.std, m.rows};
  }

  static void track(Tensor target_mean, Tensor target_std, Tensor variance, Tensor scale, Tensor shift, const Tensor& x,
                    const OptionalTensor& mask, const Tensor& sums, const Tensor& count, double process_noise,
                    double measurement_noise, std::optional<double> fixed_gain, double eps, OptionalTensor stats) {
    check_track(target_mean, target_std, variance, scale, shift, x, mask, sums, count, process_noise, measurement_noise,
                fixed_gain, eps, stats);
    const Measurement m(x, mask);
    check_apart("track_",
                {{"target_mean", target_mean},
                 {"target_std", target_std},
                 {"variance", variance},
                 {"scale", scale},
                 {"shift", shift},
                 {"stats", stats}},
                {{"x", m.x}, {"mask", m.mask.tensor}, {"sums", sums}, {"count", count}});
    const Device device("track_", m.x);
    TrackParams p;
    p.mean = m.mean.const_data_ptr<double>();
    p.std = m.std.const_data_ptr<double>();
    p.rows = m.rows.const_data_ptr<int64_t>();
    p.target_mean = target_mean.mutable_data_ptr<double>();
    p.target_std = target_std.mutable_data_ptr<double>();
    p.variance = variance.mutable_data_ptr<double>();
    p.scale = scale.mutable_data_ptr<double>();
    p.shift = shift.mutable_data_ptr<double>();
    p.sums = sums.const_data_ptr<double>();
    p.count = count.const_data_ptr<int64_t>();
    p.D = x.size(1);
    p.process_noise = process_noise;
    p.measurement_noise = measurement_noise;
    p.fixed_gain = fixed_gain.value_or(-1.0);
    p.eps = eps;
    p.stats = stats ? stats->mutable_data_ptr<double>() : nullptr;
    dispatch(x, [&](auto type) { device.track(m.params<typename decltype(type)::type>(), p); });
  }

  static void transform(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count) {
    check_transform(bank, sums, scale, shift, count);
    check_apart("transform_", {{"bank", bank}, {"sums", sums}, {"scale", scale}, {"shift", shift}}, {{"count", count}});
    const Device device("transform_", bank);
    device.check_counter("count", count, bank.size(0));
    dispatch_bank(bank, [&](auto type) {
      using S = typename decltype(type)::type;
      device.transform(transform_params<S>(bank, sums, scale, shift, count));
    });
  }

  static void standardize(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, double eps) {
    check_standardize(bank, sums, scale, shift, count, eps);
    check_apart("standardize_", {{"bank", bank}, {"sums", sums}, {"scale", scale}, {"shift", shift}},
                {{"count", count}});
    const Device device("standardize_", bank);
    device.check_counter("count", count, bank.size(0));
    dispatch_bank(bank, [&](auto type) {
      using S = typename decltype(type)::type;
      device.standardize(StandardizeParams<S>{data_of<S>(bank), sums.mutable_data_ptr<double>(),
                                              scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>(),
                                              count.const_data_ptr<int64_t>(), bank.size(0), bank.size(1), eps});
    });
  }

  static Tensor enqueue(Tensor bank, Tensor bank_labels, Tensor sums, Tensor head, Tensor count, const Tensor& z,
                        const Tensor& labels, const OptionalTensor& mask, const Tensor& scale, const Tensor& shift,
                        OptionalTensor bank_ids, const OptionalTensor& ids, OptionalTensor bank_steps,
                        const OptionalTensor& step) {
    check_enqueue(bank, bank_labels, sums, head, count, z, labels, mask, scale, shift, bank_ids, ids, bank_steps, step);
    const Tensor dense_z = as_dense(z), dense_labels = as_dense(labels);
    const Dense dense_ids(ids), rows_mask(mask);
    check_apart("enqueue_",
                {{"bank", bank},
                 {"bank_labels", bank_labels},
                 {"sums", sums},
                 {"head", head},
                 {"count", count},
                 {"bank_ids", bank_ids},
                 {"bank_steps", bank_steps}},
                {{"z", dense_z},
                 {"labels", dense_labels},
                 {"ids", dense_ids.tensor},
                 {"mask", rows_mask.tensor},
                 {"scale", scale},
                 {"shift", shift},
                 {"step", step}});
    const Device device("enqueue_", bank);
    device.check_counter("head", head, bank.size(0) - 1);
    device.check_counter("count", count, bank.size(0));
    const Tensor slots = torch::stable::new_empty(dense_labels, {z.size(0)});
    dispatch(z, [&](auto z_type) {
      using T = typename decltype(z_type)::type;
      dispatch_bank(bank, [&](auto bank_type) {
        using S = typename decltype(bank_type)::type;
        EnqueueParams<T, S> p;
        p.bank = data_of<S>(bank);
        p.bank_labels = bank_labels.mutable_data_ptr<int64_t>();
        p.bank_ids = bank_ids ? bank_ids->mutable_data_ptr<int64_t>() : nullptr;
        p.bank_steps = bank_steps ? bank_steps->mutable_data_ptr<int64_t>() : nullptr;
        p.sums = sums.mutable_data_ptr<double>();
        p.head = head.mutable_data_ptr<int64_t>();
        p.count = count.mutable_data_ptr<int64_t>();
        p.z = dense_z.const_data_ptr<T>();
        p.labels = dense_labels.const_data_ptr<int64_t>();
        p.ids = dense_ids.data<int64_t>();
        p.step = step ? step->const_data_ptr<int64_t>() : nullptr;
        p.mask = rows_mask.data<bool>();
        p.scale = scale.const_data_ptr<double>();
        p.shift = shift.const_data_ptr<double>();
        p.slots = slots.mutable_data_ptr<int64_t>();
        p.B = z.size(0);
        p.M = bank.size(0);
        p.D = bank.size(1);
        device.enqueue(p);
      });
    });
    return slots;
  }

  static std::tuple<Tensor, Tensor, Tensor> memory_loss(const Tensor& z, const Tensor& labels, const Tensor& bank,
                                                        const Tensor& bank_labels, const OptionalTensor& count,
                                                        const OptionalTensor& scale, const OptionalTensor& shift,
                                                        const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                                        const OptionalTensor& anchors, const std::string& loss,
                                                        const std::vector<double>& parameters, bool renormalize,
                                                        double eps, bool need_grad) {
    check_memory_loss(z, labels, bank, bank_labels, count, scale, shift, bank_ids, exclude, anchors, eps);
    const LossSpec spec = parse_loss("memory_loss", loss, parameters);
    const Ranking r(z, labels, bank_labels, bank_ids, exclude, anchors, need_grad);
    const Device device("memory_loss", r.z);
    if (count) device.check_counter("count", *count, bank.size(0));
    dispatch(z, [&](auto z_type) {
      dispatch_bank(bank, [&](auto bank_type) {
        using T = typename decltype(z_type)::type;
        using S = typename decltype(bank_type)::type;
        device.memory_loss(r.params<T, S>(bank, count, scale, shift, renormalize, eps), spec, r.z);
      });
    });
    return {r.value, r.grad_z, r.pairs};
  }

  static std::tuple<Tensor, Tensor, Tensor> transform_memory_loss(
      Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, const Tensor& z, const Tensor& labels,
      const Tensor& bank_labels, const OptionalTensor& ranked, const OptionalTensor& bank_ids,
      const OptionalTensor& exclude, const OptionalTensor& anchors, const std::string& loss,
      const std::vector<double>& parameters, bool renormalize, double eps, bool need_grad) {
    constexpr const char* op = "transform_memory_loss_";
    check_transform_memory_loss(bank, sums, scale, shift, count, z, labels, bank_labels, ranked, bank_ids, exclude,
                                anchors, eps);
    const LossSpec spec = parse_loss(op, loss, parameters);
    const Ranking r(z, labels, bank_labels, bank_ids, exclude, anchors, need_grad);
    check_apart(op, {{"bank", bank}, {"sums", sums}, {"scale", scale}, {"shift", shift}},
                {{"count", count},
                 {"z", r.z},
                 {"labels", r.labels},
                 {"bank_labels", r.rows_labels},
                 {"ranked", ranked},
                 {"bank_ids", r.rows_ids.tensor},
                 {"exclude", r.exclude.tensor},
                 {"anchors", r.anchors.tensor}});
    const Device device(op, r.z);
    device.check_counter("count", count, bank.size(0));
    if (ranked) device.check_counter("ranked", *ranked, bank.size(0));
    dispatch(z, [&](auto z_type) {
      dispatch_bank(bank, [&](auto bank_type) {
        using T = typename decltype(z_type)::type;
        using S = typename decltype(bank_type)::type;
        device.transform_memory_loss(
            transform_params<S>(bank, sums, scale, shift, count),
            r.params<T, S>(bank, ranked ? ranked : OptionalTensor(count), scale, shift, renormalize, eps), spec, r.z);
      });
    });
    return {r.value, r.grad_z, r.pairs};
  }

  static std::tuple<Tensor, Tensor> batch_loss(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                               const OptionalTensor& anchors, const std::string& loss,
                                               const std::vector<double>& parameters, bool renormalize, double eps,
                                               bool need_grad) {
    check_batch_loss(dots, labels, ids, anchors, eps);
    const LossSpec spec = parse_loss("batch_loss", loss, parameters);
    const Tensor dense_dots = as_dense(dots), dense_labels = as_dense(labels);
    const Dense dense_ids(ids), dense_anchors(anchors);
    const int64_t B = dots.size(0);
    const Tensor value = torch::stable::new_empty(dense_dots, {});
    const Tensor grad_dots = torch::stable::new_empty(dense_dots, {need_grad ? B : 0, B});
    const Device device("batch_loss", dense_dots);
    dispatch(dots, [&](auto type) {
      using T = typename decltype(type)::type;
      BatchLossParams<T> p;
      p.dots = dense_dots.const_data_ptr<T>();
      p.labels = dense_labels.const_data_ptr<int64_t>();
      p.ids = dense_ids.template data<int64_t>();
      p.anchors = dense_anchors.template data<bool>();
      p.B = B;
      p.renormalize = renormalize;
      p.eps = eps;
      p.loss = value.mutable_data_ptr<T>();
      p.grad_dots = need_grad ? grad_dots.mutable_data_ptr<T>() : nullptr;
      device.batch_loss(p, spec);
    });
    return {value, grad_dots};
  }

 private:
  template <typename S>
  static TransformParams<S> transform_params(const Tensor& bank, const Tensor& sums, const Tensor& scale,
                                             const Tensor& shift, const Tensor& count) {
    return {data_of<S>(bank),
            sums.mutable_data_ptr<double>(),
            scale.mutable_data_ptr<double>(),
            shift.mutable_data_ptr<double>(),
            count.const_data_ptr<int64_t>(),
            bank.size(0),
            bank.size(1)};
  }
};

// The body of a STABLE_TORCH_LIBRARY_IMPL(xbn_ext, …, m).
#define XBN_REGISTER_OPS(m, Device)                                                        \
  do {                                                                                     \
    m.impl("normalize", TORCH_BOX(&xbn::Ops<Device>::normalize));                          \
    m.impl("normalize_backward", TORCH_BOX(&xbn::Ops<Device>::normalize_backward));        \
    m.impl("moments", TORCH_BOX(&xbn::Ops<Device>::moments));                              \
    m.impl("track_", TORCH_BOX(&xbn::Ops<Device>::track));                                 \
    m.impl("transform_", TORCH_BOX(&xbn::Ops<Device>::transform));                         \
    m.impl("standardize_", TORCH_BOX(&xbn::Ops<Device>::standardize));                     \
    m.impl("enqueue_", TORCH_BOX(&xbn::Ops<Device>::enqueue));                             \
    m.impl("memory_loss", TORCH_BOX(&xbn::Ops<Device>::memory_loss));                      \
    m.impl("transform_memory_loss_", TORCH_BOX(&xbn::Ops<Device>::transform_memory_loss)); \
    m.impl("batch_loss", TORCH_BOX(&xbn::Ops<Device>::batch_loss));                        \
  } while (false)

}  // namespace xbn
