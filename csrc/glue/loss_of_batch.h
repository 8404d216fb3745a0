// The ops that rank a batch against itself, all of its rows or some (their kernels are in loss/batch_loss of cpu/ and of
// cuda/).
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"
#include "loss_spec.h"

namespace xbn::glue {

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

template <typename Device>
std::tuple<Tensor, Tensor> batch_sums(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                      const OptionalTensor& anchors, const std::string& loss,
                                      const std::vector<double>& parameters, int64_t first, bool need_grad) {
  const OwnAnchors r(Contract("batch_sums", dots), dots, {labels, ids, anchors}, false, first, need_grad);
  const LossSpec spec = parse_loss("batch_sums", loss, parameters);
  check(!gives_in_common(spec), "batch_sums: ", loss, " weighs pairs by a mean over all anchors");
  const Tensor totals = torch::stable::new_empty(dots, {7}, ScalarType::Double);
  const Device device("batch_sums", r.dots);
  dispatch(dots, [&](auto type) {
    auto p = r.params(type);
    p.totals = totals.template mutable_data_ptr<double>();
    device.run([&](const auto& on) { return batch_sums(p, spec, on); });
  });
  return {totals, r.grad_dots};
}

template <typename Device, typename Library>
void register_loss_of_batch_ops(Library& m) {
  m.impl("batch_loss", TORCH_BOX(&xbn::glue::batch_loss<Device>));
  m.impl("batch_sums", TORCH_BOX(&xbn::glue::batch_sums<Device>));
}

}  // namespace xbn::glue
