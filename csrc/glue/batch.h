// The ops that look at a batch alone. Their kernels: normalize and moments in cpu/ and cuda/.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

// A batch to be normalised, dense, and room for that.
struct Normalizing {
  Normalizing(const Contract& c, const Tensor& batch, double its_eps) : eps(its_eps) {
    c.matrix("x", batch, "[B, D]", {-1, -1});
    c.eps(eps);
    x = as_dense(batch);
    z = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    norm = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Double);
  }

  template <typename T>
  NormalizeParams<T> params(Type<T> type) const {
    NormalizeParams<T> p;
    p.x = data_in(x, type);
    p.B = x.size(0);
    p.D = x.size(1);
    p.eps = eps;
    p.z = data_of(z, type);
    p.norm = norm.mutable_data_ptr<double>();
    return p;
  }

  const double eps;
  Tensor x, z, norm;
};

template <typename Device>
std::tuple<Tensor, Tensor> normalize(const Tensor& x, double eps) {
  const Normalizing n(Contract("normalize", x), x, eps);
  const Device device("normalize", n.x);
  dispatch(x, [&](auto type) { device.run([&](const auto& on) { return normalize(n.params(type), on); }); });
  return {n.z, n.norm};
}

template <typename Device>
Tensor normalize_backward(const Tensor& grad_z, const Tensor& z, const Tensor& norm, double eps) {
  const Contract c("normalize_backward", z);
  c.matrix("z", z, "[B, D]", {-1, -1});
  c.shape("grad_z", grad_z, "[B, D]", {z.size(0), z.size(1)});
  c.dtype("grad_z", grad_z, z.scalar_type(), "of the dtype of z");
  c.statistic("norm", norm, "[B]", {z.size(0)});
  c.eps(eps);
  const Tensor dense_grad = as_dense(grad_z), dense_z = as_dense(z);
  const int64_t B = z.size(0), D = z.size(1);
  const Tensor grad_x = torch::stable::new_empty(dense_z, {B, D});
  const Device device("normalize_backward", dense_z);
  dispatch(z, [&](auto type) {
    NormalizeBackwardParams<typename decltype(type)::type> p;
    p.grad_z = data_in(dense_grad, type);
    p.z = data_in(dense_z, type);
    p.norm = norm.const_data_ptr<double>();
    p.B = B;
    p.D = D;
    p.eps = eps;
    p.grad_x = data_of(grad_x, type);
    device.run([&](const auto& on) { return normalize_backward(p, on); });
  });
  return grad_x;
}

// A batch to be measured, dense, and room for its moments.
struct Measurement {
  Measurement(const Contract& c, const Tensor& batch, const OptionalTensor& rows_mask) : mask(rows_mask) {
    c.matrix("x", batch, "[B, D]", {-1, -1});
    c.rows_mask("mask", rows_mask, batch.size(0));
    x = as_dense(batch);
    mean = torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double);
    std = torch::stable::new_empty(x, {x.size(1)}, ScalarType::Double);
    rows = torch::stable::new_empty(x, {}, ScalarType::Long);
  }

  template <typename T>
  MomentsParams<T> params(Type<T> type) const {
    MomentsParams<T> p;
    p.x = data_in(x, type);
    p.mask = mask.data<bool>();
    p.B = x.size(0);
    p.D = x.size(1);
    p.mean = mean.mutable_data_ptr<double>();
    p.std = std.mutable_data_ptr<double>();
    p.rows = rows.mutable_data_ptr<int64_t>();
    return p;
  }

  Tensor x;
  Dense mask;
  Tensor mean, std, rows;
};

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& mask) {
  const Measurement m(Contract("moments", x), x, mask);
  const Device device("moments", m.x);
  dispatch(x, [&](auto type) { device.run([&](const auto& on) { return moments(m.params(type), on); }); });
  return {m.mean, m.std, m.rows};
}

template <typename Device, typename Library>
void register_batch_ops(Library& m) {
  m.impl("normalize", TORCH_BOX(&xbn::glue::normalize<Device>));
  m.impl("normalize_backward", TORCH_BOX(&xbn::glue::normalize_backward<Device>));
  m.impl("moments", TORCH_BOX(&xbn::glue::moments<Device>));
}

}  // namespace xbn::glue
