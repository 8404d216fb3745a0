// transform_ between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

// A bank with a pending map, as the ops that rewrite it take it.
struct MappedBank {
  MappedBank(const Contract& c, const Tensor& bank_, const Tensor& sums_, const Tensor& scale_, const Tensor& shift_,
             const Tensor& count_)
      : bank(bank_), sums(sums_), scale(scale_), shift(shift_), count(count_) {
    c.bank("bank", bank);
    const int64_t D = bank.size(1);
    c.statistic("sums", sums, "[2, D]", {2, D});
    c.statistic("scale", scale, "[D]", {D});
    c.statistic("shift", shift, "[D]", {D});
    c.counter("count", count);
  }

  // What is written shares no memory with itself, nor with what else is read.
  void check_apart_from(const char* op, std::vector<Argument> read = {}) const {
    read.insert(read.begin(), {"count", count});
    check_apart(op, {{"bank", bank}, {"sums", sums}, {"scale", scale}, {"shift", shift}}, read);
  }

  template <typename S>
  TransformParams<S> params(Type<S> type) const {
    TransformParams<S> p;
    p.bank = data_of(bank, type);
    p.sums = sums.mutable_data_ptr<double>();
    p.scale = scale.mutable_data_ptr<double>();
    p.shift = shift.mutable_data_ptr<double>();
    p.count = count.const_data_ptr<int64_t>();
    p.M = bank.size(0);
    p.D = bank.size(1);
    return p;
  }

  template <typename S>
  StandardizeParams<S> standardize_params(Type<S> type, double eps, const OptionalTensor& ring_sums = {},
                                          const OptionalTensor& ring_count = {}) const {
    return {params(type), ring_sums.value_or(sums).template const_data_ptr<double>(),
            ring_count.value_or(count).template const_data_ptr<int64_t>(), eps};
  }

  const Tensor bank, sums, scale, shift, count;
};

template <typename Device>
void transform(Tensor bank, Tensor sums, Tensor scale, Tensor shift, const Tensor& count) {
  const MappedBank m(Contract("transform_", bank), bank, sums, scale, shift, count);
  m.check_apart_from("transform_");
  const Device device("transform_", bank);
  device.check_counter("count", count, bank.size(0));
  dispatch_bank(bank, [&](auto type) { device.run([&](const auto& on) { return transform(m.params(type), on); }); });
}

}  // namespace xbn::glue
