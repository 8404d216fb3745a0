// standardize_ between torch and its kernel.
#pragma once

#include "transform.h"

namespace xbn::glue {

template <typename Device>
void standardize(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count, double eps) {
  const Contract c("standardize_", bank);
  const MappedBank m(c, bank, sums, scale, shift, count);
  c.eps(eps);
  m.check_apart_from("standardize_");
  const Device device("standardize_", bank);
  device.check_counter("count", count, bank.size(0));
  dispatch_bank(bank, [&](auto type) {
    const StandardizeParams<typename decltype(type)::type> p{m.params(type), eps};
    device.run([&](const auto& on) { return standardize(p, on); });
  });
}

}  // namespace xbn::glue
