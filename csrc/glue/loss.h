// The ops that rank a batch: against the bank (their kernels are in loss/memory_loss.cpp of cpu/ and of cuda/), and
// against itself (loss/batch_loss).
#pragma once

#include "bank.h"
#include "loss_spec.h"

namespace xbn::glue {

// What a batch is ranked against, and how: all that both ops take besides the batch and the bank.
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

// Which rows of a batch are ranked against each other.
struct OwnPairs {
  Tensor labels;
  OptionalTensor ids, anchors;
};

// Anchors of a batch to be ranked against all of it, the operands dense, and room for the gradient.
struct OwnAnchors {
  // all: every row is an anchor; else so many as there are products of, from row `its_first` on
  OwnAnchors(const Contract& c, const Tensor& products, const OwnPairs& o, bool all, int64_t its_first, bool its_grad)
      : first(its_first), need_grad(its_grad), ids(o.ids), anchors(o.anchors) {
    c.floating("dots", products);
    c.given("labels", o.labels);
    const int64_t B = o.labels.dim() == 1 ? o.labels.size(0) : products.dim() > 0 ? products.size(-1) : 0;
    c.shape("dots", products, all ? "[B, B]" : "[A, B]", {all ? B : -1, B});
    c.labels("labels", o.labels, "[B]", B);
    if (o.ids) c.labels("ids", *o.ids, "[B]", B);
    const int64_t A = products.size(0);
    c.rows_mask("anchors", o.anchors, A, all ? "[B]" : "[A]");
    c.require(0 <= first && first <= B - A, "first must be within [0, B - A] = [0, ", B - A, "], got ", first);
    dots = as_dense(products);
    labels = as_dense(o.labels);
    grad_dots = torch::stable::new_empty(dots, {need_grad ? A : 0, B});
  }

  template <typename T>
  BatchSumsParams<T> params(Type<T> type) const {
    BatchSumsParams<T> p;
    p.dots = data_in(dots, type);
    p.labels = labels.const_data_ptr<int64_t>();
    p.ids = ids.data<int64_t>();
    p.anchors = anchors.data<bool>();
    p.A = dots.size(0);
    p.B = labels.size(0);
    p.first = first;
    p.totals = nullptr;
    p.grad_dots = need_grad ? data_of(grad_dots, type) : nullptr;
    return p;
  }

  const int64_t first;
  const bool need_grad;
  Tensor dots, labels;
  const Dense ids, anchors;
  Tensor grad_dots;
};

// A batch to be ranked against itself, and room for the loss, too.
struct OwnRanking : OwnAnchors {
  OwnRanking(const Contract& c, const Tensor& products, const OwnPairs& pairs, bool its_renormalize, double its_eps,
             bool its_grad)
      : OwnAnchors(c, products, pairs, true, 0, its_grad), renormalize(its_renormalize), eps(its_eps) {
    c.eps(eps);
    value = torch::stable::new_empty(dots, {});
  }

  template <typename T>
  BatchLossParams<T> params(Type<T> type) const {
    return {OwnAnchors::params(type), renormalize, eps, data_of(value, type)};
  }

  const bool renormalize;
  const double eps;
  Tensor value;
};

template <typename Device>
std::tuple<Tensor, Tensor> batch_loss(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                      const OptionalTensor& anchors, const std::string& loss,
                                      const std::vector<double>& parameters, bool renormalize, double eps,
                                      bool need_grad) {
  const OwnRanking r(Contract("batch_loss", dots), dots, {labels, ids, anchors}, renormalize, eps, need_grad);
  const LossSpec spec = parse_loss("batch_loss", loss, parameters);
  const Device device("batch_loss", r.dots);
  dispatch(dots, [&](auto type) { device.run([&](const auto& on) { return batch_loss(r.params(type), spec, on); }); });
  return {r.value, r.grad_dots};
}

template <typename Device, typename Library>
void register_loss_ops(Library& m) {
  m.impl("memory_loss", TORCH_BOX(&xbn::glue::memory_loss<Device>));
  m.impl("transform_memory_loss_", TORCH_BOX(&xbn::glue::transform_memory_loss<Device>));
  m.impl("batch_loss", TORCH_BOX(&xbn::glue::batch_loss<Device>));
}

}  // namespace xbn::glue
