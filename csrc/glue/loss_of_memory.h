// The ops that rank a batch against the bank, whole or a part of one (their kernels are in loss/: in cpu/ in
// memory_loss.cpp and settle_sums.cpp, in cuda/ in memory_loss.cpp and memory_sums.cu).
#pragma once

#include "bank.h"
#include "loss_spec.h"

namespace xbn::glue {

// What a batch is ranked against, and how: all that these ops take besides the batch, the bank and the loss.
struct Ranked {
  OptionalTensor count, scale, shift, bank_ids, exclude, anchors;
  bool renormalize;
  double eps;
  bool need_grad;
};

// A batch to be ranked against a bank, its operands dense, and room for the results.
struct Ranking {
  // pairs_: where the pairs are counted; none: in a tensor of its own.
  Ranking(const Contract& c, const Tensor& z_, const Tensor& labels_, const Tensor& bank_, const Tensor& bank_labels_,
          const Ranked& ranked, const OptionalTensor& pairs_ = {})
      : r(ranked), bank(bank_), bank_ids(r.bank_ids), exclude(r.exclude), anchors(r.anchors) {
    c.matrix("z", z_, "[B, D]", {-1, -1});
    const int64_t B = z_.size(0), D = z_.size(1);
    c.labels("labels", labels_, "[B]", B);
    c.bank("bank", bank, D);
    const int64_t M = bank.size(0);
    c.labels("bank_labels", bank_labels_, "[M]", M);
    if (r.count) c.counter("count", *r.count);
    c.require(r.scale.has_value() == r.shift.has_value(), "scale and shift go together");
    if (r.scale) c.statistic("scale", *r.scale, "[D]", {D});
    if (r.shift) c.statistic("shift", *r.shift, "[D]", {D});
    c.require(r.exclude.has_value() || !r.bank_ids, "bank_ids are for exclude, which is missing");
    if (r.bank_ids) c.labels("bank_ids", *r.bank_ids, "[M]", M);
    if (r.exclude) c.labels("exclude", *r.exclude, "[B]", B);
    c.rows_mask("anchors", r.anchors, B);
    c.eps(r.eps);
    z = as_dense(z_);
    labels = as_dense(labels_);
    bank_labels = as_dense(bank_labels_);
    value = torch::stable::new_empty(z, {});
    grad_z = torch::stable::new_empty(z, {r.need_grad ? B : 0, D});
    pairs = pairs_ ? *pairs_ : torch::stable::new_empty(z, {2}, ScalarType::Double);
  }

  template <typename T, typename S>
  MemoryLossParams<T, S> params(Type<T> type, Type<S> bank_type) const {
    MemoryLossParams<T, S> p;
    p.z = data_in(z, type);
    p.labels = labels.const_data_ptr<int64_t>();
    p.bank = data_in(bank, bank_type);
    p.bank_labels = bank_labels.const_data_ptr<int64_t>();
    p.count = data_in<int64_t>(r.count);
    p.B = z.size(0);
    p.M = bank.size(0);
    p.D = z.size(1);
    p.scale = data_in<double>(r.scale);
    p.shift = data_in<double>(r.shift);
    p.bank_ids = bank_ids.data<int64_t>();
    p.exclude = exclude.data<int64_t>();
    p.anchors = anchors.data<bool>();
    p.renormalize = r.renormalize;
    p.eps = r.eps;
    p.loss = data_of(value, type);
    p.grad_z = r.need_grad ? data_of(grad_z, type) : nullptr;
    p.pairs = pairs.mutable_data_ptr<double>();
    return p;
  }

  const Ranked r;
  const Tensor bank;
  Tensor z, labels, bank_labels;
  const Dense bank_ids, exclude, anchors;
  Tensor value, grad_z, pairs;
};

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> memory_loss(const Tensor& z, const Tensor& labels, const Tensor& bank,
                                               const Tensor& bank_labels, const OptionalTensor& count,
                                               const OptionalTensor& scale, const OptionalTensor& shift,
                                               const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                               const OptionalTensor& anchors, const std::string& loss,
                                               const std::vector<double>& parameters, bool renormalize, double eps,
                                               bool need_grad) {
  const Contract c("memory_loss", z);
  const Ranking r(c, z, labels, bank, bank_labels,
                  {count, scale, shift, bank_ids, exclude, anchors, renormalize, eps, need_grad});
  const LossSpec spec = parse_loss("memory_loss", loss, parameters);
  const Device device("memory_loss", r.z);
  if (count) device.check_counter("count", *count, bank.size(0));
  dispatch(z, bank, [&](auto type, auto bank_type) {
    device.run([&](const auto& on) { return memory_loss(r.params(type, bank_type), spec, on); });
  });
  return {r.value, r.grad_z, r.pairs};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> transform_memory_loss(Tensor bank, Tensor sums, Tensor scale, Tensor shift,
                                                         const Tensor& count, const Tensor& z, const Tensor& labels,
                                                         const Tensor& bank_labels, const OptionalTensor& ranked,
                                                         const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                                         const OptionalTensor& anchors, const std::string& loss,
                                                         const std::vector<double>& parameters, bool renormalize,
                                                         double eps, bool need_grad) {
  constexpr const char* op = "transform_memory_loss_";
  const Contract c(op, bank);
  const MappedBank m(c, bank, sums, scale, shift, count);
  if (ranked) c.counter("ranked", *ranked);
  const Ranking r(c, z, labels, bank, bank_labels,
                  {ranked ? ranked : count, scale, shift, bank_ids, exclude, anchors, renormalize, eps, need_grad});
  const LossSpec spec = parse_loss(op, loss, parameters);
  m.check_apart_from(op, {{"z", r.z},
                          {"labels", r.labels},
                          {"bank_labels", r.bank_labels},
                          {"ranked", ranked},
                          {"bank_ids", r.bank_ids.tensor},
                          {"exclude", r.exclude.tensor},
                          {"anchors", r.anchors.tensor}});
  const Device device(op, r.z);
  device.check_counter("count", count, bank.size(0));
  if (ranked) device.check_counter("ranked", *ranked, bank.size(0));
  dispatch(z, bank, [&](auto type, auto bank_type) {
    device.run([&](const auto& on) {
      return transform_memory_loss(m.params(bank_type), r.params(type, bank_type), spec, on);
    });
  });
  return {r.value, r.grad_z, r.pairs};
}

template <typename Device>
std::tuple<Tensor, Tensor> memory_sums(const Tensor& z, const Tensor& labels, const Tensor& bank,
                                       const Tensor& bank_labels, const OptionalTensor& count,
                                       const OptionalTensor& scale, const OptionalTensor& shift,
                                       const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                       const OptionalTensor& anchors, const OptionalTensor& given,
                                       const std::string& loss, const std::vector<double>& parameters, int64_t number,
                                       int64_t first, bool renormalize, double eps, bool need_grad) {
  const Contract c("memory_sums", z);
  const Ranking r(c, z, labels, bank, bank_labels,
                  {count, scale, shift, bank_ids, exclude, anchors, renormalize, eps, false});
  const LossSpec spec = parse_loss("memory_sums", loss, parameters);
  c.require(!goes_in_rounds(spec), loss, " has no sums that could be added up");
  const int64_t passes = make_program(spec).passes, B = z.size(0);
  c.require(0 <= number && number < passes, "number must be within [0, ", passes - 1, "], got ", number);
  c.require(first >= 0, "first must not be negative, got ", first);
  c.require(given.has_value() == (number > 0), "given is for all passes but the first");
  if (given) c.statistic("given", *given, "[B]", {B});
  const Tensor sums = torch::stable::new_empty(z, {kSlots, B, 4}, ScalarType::Double);
  const Tensor grads = torch::stable::new_empty(z, {kSlots, need_grad ? B : 0, z.size(1)});
  const Device device("memory_sums", r.z);
  if (count) device.check_counter("count", *count, bank.size(0));
  dispatch(z, bank, [&](auto type, auto bank_type) {
    using T = typename decltype(type)::type;
    using S = typename decltype(bank_type)::type;
    MemorySumsParams<T, S> p = {r.params(type, bank_type)};
    p.grad_z = need_grad ? data_of(grads, type) : nullptr;
    p.number = static_cast<int>(number);
    p.first = first;
    p.given = data_in<double>(given);
    p.sums = static_cast<RowSums*>(sums.mutable_data_ptr());
    device.run([&](const auto& on) { return memory_sums(p, spec, on); });
  });
  return {sums, grads};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> settle_sums(const Tensor& parts, const OptionalTensor& anchors,
                                               const std::string& loss, const std::vector<double>& parameters,
                                               int64_t passes) {
  const Contract c("settle_sums", parts);
  c.statistic("parts", parts, "[n, 2, B, 4]", {-1, kSlots, -1, 4});
  const int64_t n = parts.size(0), B = parts.size(2);
  c.require(n > 0, "parts must be of one part at least");
  c.rows_mask("anchors", anchors, B);
  const LossSpec spec = parse_loss("settle_sums", loss, parameters);
  c.require(!goes_in_rounds(spec), loss, " has no sums that could be added up");
  const int64_t all = make_program(spec).passes;
  c.require(1 <= passes && passes <= all, "passes must be within [1, ", all, "], got ", passes);
  const Tensor given = torch::stable::new_empty(parts, {B});
  const Tensor scale = torch::stable::new_empty(parts, {n, kSlots, B});
  const Tensor totals = torch::stable::new_empty(parts, {7});
  const Dense mask(anchors);
  SettleSumsParams p;
  p.parts = static_cast<const RowSums*>(parts.const_data_ptr());
  p.anchors = mask.data<bool>();
  p.n = n;
  p.B = B;
  p.passes = static_cast<int>(passes);
  p.given = given.mutable_data_ptr<double>();
  p.scale = scale.mutable_data_ptr<double>();
  p.totals = totals.mutable_data_ptr<double>();
  const Device device("settle_sums", parts);
  device.run([&](const auto& on) { return settle_sums(p, spec, on); });
  return {given, scale, totals};
}

template <typename Device, typename Library>
void register_loss_of_memory_ops(Library& m) {
  m.impl("memory_loss", TORCH_BOX(&xbn::glue::memory_loss<Device>));
  m.impl("transform_memory_loss_", TORCH_BOX(&xbn::glue::transform_memory_loss<Device>));
  m.impl("memory_sums", TORCH_BOX(&xbn::glue::memory_sums<Device>));
  m.impl("settle_sums", TORCH_BOX(&xbn::glue::settle_sums<Device>));
}

}  // namespace xbn::glue
