// The CPU backend: tensors in, plain structs to the kernels. No arithmetic here.
#include <algorithm>

#include "../contract.h"
#include "enqueue.h"
#include "loss.h"
#include "moments.h"
#include "standardize.h"
#include "track.h"
#include "transform.h"

namespace xbn {
namespace {

void parallel(int64_t units, const std::function<void(int64_t)>& unit) {
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) unit(i);
  });
}

// Where an op runs. Resolved once, before any thread starts, so that a bad XBN_CPU_ISA is reported as what it is.
Cpu this_cpu() { return {cpu_isa(), parallel}; }

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

// An optional tensor as dense data: keeps the dense copy alive as long as its pointer is used.
struct Dense {
  explicit Dense(const OptionalTensor& t) {
    if (t) tensor = torch::stable::contiguous(*t);
  }
  template <typename T>
  const T* data() const {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
  }
  OptionalTensor tensor;
};

Tensor as_dense(const Tensor& t) { return torch::stable::contiguous(t); }

// Counters of a memory. Reading them is free here, so a damaged one is an error and not a wild write.
int64_t read_counter(const char* op, const char* name, const Tensor& t, int64_t last) {
  const int64_t value = *t.const_data_ptr<int64_t>();
  check(0 <= value && value <= last, op, ": ", name, " must be within [0, ", last, "], got ", value);
  return value;
}

struct MeasuredMoments {
  Tensor mean, std, rows;
};

MeasuredMoments measure(const Tensor& x, const OptionalTensor& mask) {
  const Tensor dense = as_dense(x);
  const Dense rows_mask(mask);
  const int64_t B = x.size(0), D = x.size(1);
  MeasuredMoments m{torch::stable::new_empty(dense, {D}, ScalarType::Double),
                    torch::stable::new_empty(dense, {D}, ScalarType::Double),
                    torch::stable::new_empty(dense, {}, ScalarType::Long)};
  dispatch(x, [&](auto type) {
    using T = typename decltype(type)::type;
    moments(MomentsParams<T>{dense.const_data_ptr<T>(), rows_mask.data<bool>(), B, D, m.mean.mutable_data_ptr<double>(),
                             m.std.mutable_data_ptr<double>(), m.rows.mutable_data_ptr<int64_t>()},
            this_cpu());
  });
  return m;
}

std::tuple<Tensor, Tensor, Tensor> moments_cpu(const Tensor& x, const OptionalTensor& mask) {
  check_moments(x, mask);
  const MeasuredMoments m = measure(x, mask);
  return {m.mean, m.std, m.rows};
}

void track_cpu(Tensor target_mean, Tensor target_std, Tensor variance, Tensor scale, Tensor shift, const Tensor& x,
               const OptionalTensor& mask, const Tensor& sums, const Tensor& count, double process_noise,
               double measurement_noise, std::optional<double> fixed_gain, double eps) {
  check_track(target_mean, target_std, variance, scale, shift, x, mask, sums, count, process_noise, measurement_noise,
              fixed_gain, eps);
  const MeasuredMoments m = measure(x, mask);
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
  track(p);
}

void transform_cpu(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count) {
  check_transform(bank, sums, scale, shift, count);
  const int64_t D = bank.size(1), rows = read_counter("transform_", "count", count, bank.size(0));
  double* scale_data = scale.mutable_data_ptr<double>();
  double* shift_data = shift.mutable_data_ptr<double>();
  dispatch(bank, [&](auto type) {
    using S = typename decltype(type)::type;
    transform(TransformParams<S>{bank.mutable_data_ptr<S>(), scale_data, shift_data, rows, D},
              sums.mutable_data_ptr<double>(), this_cpu());
  });
  std::fill(scale_data, scale_data + D, 1.0);
  std::fill(shift_data, shift_data + D, 0.0);
}

void standardize_cpu(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, double eps) {
  check_standardize(bank, sums, scale, shift, count, eps);
  const int64_t D = bank.size(1), rows = read_counter("standardize_", "count", count, bank.size(0));
  dispatch(bank, [&](auto type) {
    using S = typename decltype(type)::type;
    standardize(StandardizeParams<S>{bank.mutable_data_ptr<S>(), sums.mutable_data_ptr<double>(),
                                     scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>(), rows, D, eps},
                this_cpu());
  });
}

// Whether two dense tensors share memory. A row of z that is a row of the bank could be overwritten before it is read.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + t.numel() * t.element_size(); };
  return begin(a) < end(b) && begin(b) < end(a);
}

Tensor enqueue_cpu(Tensor bank, Tensor bank_labels, Tensor sums, Tensor head, Tensor count, const Tensor& z,
                   const Tensor& labels, const OptionalTensor& mask, const Tensor& scale, const Tensor& shift) {
  check_enqueue(bank, bank_labels, sums, head, count, z, labels, mask, scale, shift);
  read_counter("enqueue_", "head", head, bank.size(0) - 1);
  read_counter("enqueue_", "count", count, bank.size(0));
  const Tensor dense_z = as_dense(z), dense_labels = as_dense(labels);
  check(!overlap(dense_z, bank), "enqueue_: z must not share memory with bank");
  const Dense rows_mask(mask);
  const Tensor slots = torch::stable::new_empty(dense_labels, {z.size(0)});
  dispatch(z, [&](auto z_type) {
    using T = typename decltype(z_type)::type;
    dispatch(bank, [&](auto bank_type) {
      using S = typename decltype(bank_type)::type;
      EnqueueParams<T, S> p;
      p.bank = bank.mutable_data_ptr<S>();
      p.bank_labels = bank_labels.mutable_data_ptr<int64_t>();
      p.sums = sums.mutable_data_ptr<double>();
      p.head = head.mutable_data_ptr<int64_t>();
      p.count = count.mutable_data_ptr<int64_t>();
      p.z = dense_z.const_data_ptr<T>();
      p.labels = dense_labels.const_data_ptr<int64_t>();
      p.mask = rows_mask.data<bool>();
      p.scale = scale.const_data_ptr<double>();
      p.shift = shift.const_data_ptr<double>();
      p.slots = slots.mutable_data_ptr<int64_t>();
      p.B = z.size(0);
      p.M = bank.size(0);
      p.D = bank.size(1);
      enqueue(p, this_cpu());
    });
  });
  return slots;
}

std::tuple<Tensor, Tensor> memory_loss_cpu(const Tensor& z, const Tensor& labels, const Tensor& bank,
                                           const Tensor& bank_labels, const OptionalTensor& count,
                                           const OptionalTensor& scale, const OptionalTensor& shift,
                                           const OptionalTensor& exclude, const OptionalTensor& anchors,
                                           const std::string& loss, const std::vector<double>& parameters,
                                           const std::string& reduction, bool renormalize, double eps, bool need_grad) {
  check_memory_loss(z, labels, bank, bank_labels, count, scale, shift, exclude, anchors, loss, parameters, reduction,
                    eps);
  const int64_t B = z.size(0), D = z.size(1), M = bank.size(0);
  const int64_t rows = count ? read_counter("memory_loss", "count", *count, M) : M;
  const Tensor dense_z = as_dense(z), dense_labels = as_dense(labels), dense_bank_labels = as_dense(bank_labels);
  const Dense dense_exclude(exclude), dense_anchors(anchors);
  const Tensor value = torch::stable::new_empty(dense_z, {});
  const Tensor grad_z = torch::stable::new_empty(dense_z, {need_grad ? B : 0, D});
  dispatch(z, [&](auto z_type) {
    using T = typename decltype(z_type)::type;
    dispatch(bank, [&](auto bank_type) {
      using S = typename decltype(bank_type)::type;
      MemoryLossParams<T, S> p;
      p.z = dense_z.const_data_ptr<T>();
      p.labels = dense_labels.const_data_ptr<int64_t>();
      p.bank = bank.const_data_ptr<S>();
      p.bank_labels = dense_bank_labels.const_data_ptr<int64_t>();
      p.B = B;
      p.D = D;
      p.count = rows;
      p.scale = scale ? scale->const_data_ptr<double>() : nullptr;
      p.shift = shift ? shift->const_data_ptr<double>() : nullptr;
      p.exclude = dense_exclude.data<int64_t>();
      p.anchors = dense_anchors.data<bool>();
      p.renormalize = renormalize;
      p.eps = eps;
      p.mean = reduction == "mean";
      p.loss = value.mutable_data_ptr<T>();
      p.grad_z = need_grad ? grad_z.mutable_data_ptr<T>() : nullptr;
      memory_loss(p, Contrastive<T>{static_cast<T>(parameters[0]), static_cast<T>(parameters[1])}, this_cpu());
    });
  });
  return {value, grad_z};
}

}  // namespace
}  // namespace xbn

STABLE_TORCH_LIBRARY_IMPL(xbn_ext, CPU, m) {
  m.impl("moments", TORCH_BOX(&xbn::moments_cpu));
  m.impl("track_", TORCH_BOX(&xbn::track_cpu));
  m.impl("transform_", TORCH_BOX(&xbn::transform_cpu));
  m.impl("standardize_", TORCH_BOX(&xbn::standardize_cpu));
  m.impl("enqueue_", TORCH_BOX(&xbn::enqueue_cpu));
  m.impl("memory_loss", TORCH_BOX(&xbn::memory_loss_cpu));
}
