// moments between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

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

}  // namespace xbn::glue
