// standardize_ between torch and its kernel.
#pragma once

#include "transform.h"

namespace xbn::glue {

template <typename Device>
void standardize(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, double eps,
                 const OptionalTensor& ring_sums, const OptionalTensor& ring_count) {
  const Contract c("standardize_", bank);
  const MappedBank m(c, bank, sums, scale, shift, count);
  c.eps(eps);
  c.require(ring_sums.has_value() == ring_count.has_value(), "ring_sums and ring_count go together");
  if (ring_sums) c.statistic("ring_sums", *ring_sums, "[2, D]", {2, bank.size(1)});
  if (ring_count) c.counter("ring_count", *ring_count);
  m.check_apart_from("standardize_", {{"ring_sums", ring_sums}, {"ring_count", ring_count}});
  const Device device("standardize_", bank);
  device.check_counter("count", count, bank.size(0));
  dispatch_bank(bank, [&](auto type) {
    const auto p = m.standardize_params(type, eps, ring_sums, ring_count);
    device.run([&](const auto& on) { return standardize(p, on); });
  });
}

}  // namespace xbn::glue
