// The ops of a loss that is put together from parts: of a bank and of a batch (their kernels are in loss/, in cpu/ in
// memory_loss.cpp, settle_sums.cpp and batch_loss.cpp, in cuda/ in memory_sums.cu and batch_loss.cu).
#pragma once

#include "loss.h"

namespace xbn::glue {

template <typename Device>
std::tuple<Tensor, Tensor> memory_sums(const Tensor& z, const Tensor& labels, const Tensor& bank,
                                       const Tensor& bank_labels, const OptionalTensor& count,
                                       const OptionalTensor& scale, const OptionalTensor& shift,
                                       const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                       const OptionalTensor& anchors, const OptionalTensor& given,
                                       const std::string& loss, const std::vector<double>& parameters, int64_t number,
                                       int64_t first, bool renormalize, double eps, bool need_grad) {
  const Contract c("memory_sums", z);
  const Ranking r(c, z, labels, bank, bank_labels,
                  {count, scale, shift, bank_ids, exclude, anchors, renormalize, eps, false});
  const LossSpec spec = parse_loss("memory_sums", loss, parameters);
  c.require(!goes_in_rounds(spec), loss, " has no sums that could be added up");
  const int64_t passes = make_program(spec).passes, B = z.size(0);
  c.require(0 <= number && number < passes, "number must be within [0, ", passes - 1, "], got ", number);
  c.require(first >= 0, "first must not be negative, got ", first);
  c.require(given.has_value() == (number > 0), "given is for all passes but the first");
  if (given) c.statistic("given", *given, "[B]", {B});
  const Tensor sums = torch::stable::new_empty(z, {kSlots, B, 4}, ScalarType::Double);
  const Tensor grads = torch::stable::new_empty(z, {kSlots, need_grad ? B : 0, z.size(1)});
  const Device device("memory_sums", r.z);
  if (count) device.check_counter("count", *count, bank.size(0));
  dispatch(z, bank, [&](auto type, auto bank_type) {
    using T = typename decltype(type)::type;
    using S = typename decltype(bank_type)::type;
    MemorySumsParams<T, S> p = {r.params(type, bank_type)};
    p.grad_z = need_grad ? data_of(grads, type) : nullptr;
    p.number = static_cast<int>(number);
    p.first = first;
    p.given = data_in<double>(given);
    p.sums = static_cast<RowSums*>(sums.mutable_data_ptr());
    device.run([&](const auto& on) { return memory_sums(p, spec, on); });
  });
  return {sums, grads};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> settle_sums(const Tensor& parts, const OptionalTensor& anchors,
                                               const std::string& loss, const std::vector<double>& parameters,
                                               int64_t passes) {
  const Contract c("settle_sums", parts);
  c.statistic("parts", parts, "[n, 2, B, 4]", {-1, kSlots, -1, 4});
  const int64_t n = parts.size(0), B = parts.size(2);
  c.require(n > 0, "parts must be of one part at least");
  c.rows_mask("anchors", anchors, B);
  const LossSpec spec = parse_loss("settle_sums", loss, parameters);
  c.require(!goes_in_rounds(spec), loss, " has no sums that could be added up");
  const int64_t all = make_program(spec).passes;
  c.require(1 <= passes && passes <= all, "passes must be within [1, ", all, "], got ", passes);
  const Tensor given = torch::stable::new_empty(parts, {B});
  const Tensor scale = torch::stable::new_empty(parts, {n, kSlots, B});
  const Tensor totals = torch::stable::new_empty(parts, {7});
  const Dense mask(anchors);
  SettleSumsParams p;
  p.parts = static_cast<const RowSums*>(parts.const_data_ptr());
  p.anchors = mask.data<bool>();
  p.n = n;
  p.B = B;
  p.passes = static_cast<int>(passes);
  p.given = given.mutable_data_ptr<double>();
  p.scale = scale.mutable_data_ptr<double>();
  p.totals = totals.mutable_data_ptr<double>();
  const Device device("settle_sums", parts);
  device.run([&](const auto& on) { return settle_sums(p, spec, on); });
  return {given, scale, totals};
}

template <typename Device>
std::tuple<Tensor, Tensor> batch_sums(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                                      const OptionalTensor& anchors, const std::string& loss,
                                      const std::vector<double>& parameters, int64_t first, bool need_grad) {
  const OwnAnchors r(Contract("batch_sums", dots), dots, {labels, ids, anchors}, false, first, need_grad);
  const LossSpec spec = parse_loss("batch_sums", loss, parameters);
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
void register_parts_ops(Library& m) {
  m.impl("memory_sums", TORCH_BOX(&xbn::glue::memory_sums<Device>));
  m.impl("settle_sums", TORCH_BOX(&xbn::glue::settle_sums<Device>));
  m.impl("batch_sums", TORCH_BOX(&xbn::glue::batch_sums<Device>));
}

}  // namespace xbn::glue
