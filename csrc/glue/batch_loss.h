// batch_loss between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"
#include "loss_spec.h"

namespace xbn::glue {

template <typename Device>
std::tuple<Tensor, Tensor> batch_loss(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                      const OptionalTensor& anchors, const std::string& loss,
                                      const std::vector<double>& parameters, bool renormalize, double eps,
                                      bool need_grad) {
  const Contract c("batch_loss", dots);
  c.floating("dots", dots);
  c.given("labels", labels);
  const int64_t B = labels.dim() == 1 ? labels.size(0) : dots.dim() > 0 ? dots.size(0) : 0;
  c.shape("dots", dots, "[B, B]", {B, B});
  c.labels("labels", labels, "[B]", B);
  if (ids) c.labels("ids", *ids, "[B]", B);
  c.rows_mask("anchors", anchors, B);
  c.eps(eps);
  const LossSpec spec = parse_loss("batch_loss", loss, parameters);
  const Tensor dense_dots = as_dense(dots), dense_labels = as_dense(labels);
  const Dense dense_ids(ids), dense_anchors(anchors);
  const Tensor value = torch::stable::new_empty(dense_dots, {});
  const Tensor grad_dots = torch::stable::new_empty(dense_dots, {need_grad ? B : 0, B});
  const Device device("batch_loss", dense_dots);
  dispatch(dots, [&](auto type) {
    BatchLossParams<typename decltype(type)::type> p;
    p.dots = data_in(dense_dots, type);
    p.labels = dense_labels.const_data_ptr<int64_t>();
    p.ids = dense_ids.data<int64_t>();
    p.anchors = dense_anchors.data<bool>();
    p.B = B;
    p.renormalize = renormalize;
    p.eps = eps;
    p.loss = data_of(value, type);
    p.grad_dots = need_grad ? data_of(grad_dots, type) : nullptr;
    device.run([&](const auto& on) { return batch_loss(p, spec, on); });
  });
  return {value, grad_dots};
}

}  // namespace xbn::glue
