// normalize, normalize_backward between torch and their kernels.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

template <typename Device>
std::tuple<Tensor, Tensor> normalize(const Tensor& x, double eps) {
  const Contract c("normalize", x);
  c.matrix("x", x, "[B, D]", {-1, -1});
  c.eps(eps);
  const Tensor dense = as_dense(x);
  const int64_t B = x.size(0), D = x.size(1);
  const Tensor z = torch::stable::new_empty(dense, {B, D});
  const Tensor norm = torch::stable::new_empty(dense, {B}, ScalarType::Double);
  const Device device("normalize", dense);
  dispatch(x, [&](auto type) {
    NormalizeParams<typename decltype(type)::type> p;
    p.x = data_in(dense, type);
    p.B = B;
    p.D = D;
    p.eps = eps;
    p.z = data_of(z, type);
    p.norm = norm.mutable_data_ptr<double>();
    device.run([&](const auto& on) { return normalize(p, on); });
  });
  return {z, norm};
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

}  // namespace xbn::glue
