// batch_loss between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"
#include "loss_spec.h"

namespace xbn::glue {

// Which rows of a batch are ranked against each other, and how.
struct Own {
  Tensor labels;
  OptionalTensor ids, anchors;
  bool renormalize;
  double eps;
  bool need_grad;
};

// A batch to be ranked against itself, its operands dense, and room for the results.
struct OwnRanking {
  OwnRanking(const Contract& c, const Tensor& products, const Own& own) : o(own), ids(o.ids), anchors(o.anchors) {
    c.floating("dots", products);
    c.given("labels", o.labels);
    const int64_t B = o.labels.dim() == 1 ? o.labels.size(0) : products.dim() > 0 ? products.size(0) : 0;
    c.shape("dots", products, "[B, B]", {B, B});
    c.labels("labels", o.labels, "[B]", B);
    if (o.ids) c.labels("ids", *o.ids, "[B]", B);
    c.rows_mask("anchors", o.anchors, B);
    c.eps(o.eps);
    dots = as_dense(products);
    labels = as_dense(o.labels);
    value = torch::stable::new_empty(dots, {});
    grad_dots = torch::stable::new_empty(dots, {o.need_grad ? B : 0, B});
  }

  template <typename T>
  BatchLossParams<T> params(Type<T> type) const {
    BatchLossParams<T> p;
    p.dots = data_in(dots, type);
    p.labels = labels.const_data_ptr<int64_t>();
    p.ids = ids.data<int64_t>();
    p.anchors = anchors.data<bool>();
    p.B = labels.size(0);
    p.renormalize = o.renormalize;
    p.eps = o.eps;
    p.loss = data_of(value, type);
    p.grad_dots = o.need_grad ? data_of(grad_dots, type) : nullptr;
    return p;
  }

  const Own o;
  Tensor dots, labels;
  const Dense ids, anchors;
  Tensor value, grad_dots;
};

template <typename Device>
std::tuple<Tensor, Tensor> batch_loss(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                      const OptionalTensor& anchors, const std::string& loss,
                                      const std::vector<double>& parameters, bool renormalize, double eps,
                                      bool need_grad) {
  const OwnRanking r(Contract("batch_loss", dots), dots, {labels, ids, anchors, renormalize, eps, need_grad});
  const LossSpec spec = parse_loss("batch_loss", loss, parameters);
  const Device device("batch_loss", r.dots);
  dispatch(dots, [&](auto type) { device.run([&](const auto& on) { return batch_loss(r.params(type), spec, on); }); });
  return {r.value, r.grad_dots};
}

}  // namespace xbn::glue
