// From a dtype that is known at run time to a type.
#pragma once

#include "../check.h"
#include "../math/half.h"
#include "tensor.h"

namespace xbn {

// Calls f with Type<float> or Type<double>; the contract has seen to it that there is no third.
template <typename F>
void dispatch(const Tensor& t, const F& f) {
  if (t.scalar_type() == ScalarType::Float) return f(Type<float>{});
  check(t.scalar_type() == ScalarType::Double, "unsupported dtype ", t.scalar_type());
  f(Type<double>{});
}

// The same for a bank: 16-bit ones, too.
template <typename F>
void dispatch_bank(const Tensor& bank, const F& f) {
#define XBN_CASE(S, name, ...) \
  if (bank.scalar_type() == ScalarType::name) return f(Type<S>{});
  XBN_FOR_EACH_BANK(XBN_CASE)
#undef XBN_CASE
  check(false, "unsupported dtype ", bank.scalar_type());
}

// For a batch and a bank.
template <typename F>
void dispatch(const Tensor& batch, const Tensor& bank, const F& f) {
  dispatch(batch, [&](auto type) { dispatch_bank(bank, [&](auto bank_type) { f(type, bank_type); }); });
}

}  // namespace xbn
