// enqueue_ between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

template <typename Device>
Tensor enqueue(Tensor bank, Tensor bank_labels, Tensor sums, Tensor head, Tensor count, const Tensor& z,
               const Tensor& labels, const OptionalTensor& mask, const Tensor& scale, const Tensor& shift,
               OptionalTensor bank_ids, const OptionalTensor& ids, OptionalTensor bank_steps,
               const OptionalTensor& step) {
  const Contract c("enqueue_", bank);
  c.bank("bank", bank);
  const int64_t M = bank.size(0), D = bank.size(1);
  check(M > 0, "enqueue_: bank must have at least one row");
  c.labels("bank_labels", bank_labels, "[M]", M);
  c.contiguous("bank_labels", bank_labels);
  c.statistic("sums", sums, "[2, D]", {2, D});
  c.counter("head", head);
  c.counter("count", count);
  c.matrix("z", z, "[B, D]", {-1, D});
  const int64_t B = z.size(0);
  c.labels("labels", labels, "[B]", B);
  c.rows_mask("mask", mask, B);
  c.statistic("scale", scale, "[D]", {D});
  c.statistic("shift", shift, "[D]", {D});
  for (const auto& [name, t] : {std::pair("bank_ids", &bank_ids), std::pair("bank_steps", &bank_steps)}) {
    if (!*t) continue;
    c.labels(name, **t, "[M]", M);
    c.contiguous(name, **t);
  }
  check(bank_ids.has_value() || !ids, "enqueue_: ids need bank_ids to be stored in");
  if (ids) c.labels("ids", *ids, "[B]", B);
  check(bank_steps.has_value() == step.has_value(), "enqueue_: bank_steps and step go together");
  if (step) c.counter("step", *step);

  const Tensor dense_z = as_dense(z), dense_labels = as_dense(labels);
  const Dense dense_ids(ids), rows_mask(mask);
  check_apart("enqueue_",
              {{"bank", bank},
               {"bank_labels", bank_labels},
               {"sums", sums},
               {"head", head},
               {"count", count},
               {"bank_ids", bank_ids},
               {"bank_steps", bank_steps}},
              {{"z", dense_z},
               {"labels", dense_labels},
               {"ids", dense_ids.tensor},
               {"mask", rows_mask.tensor},
               {"scale", scale},
               {"shift", shift},
               {"step", step}});
  const Device device("enqueue_", bank);
  device.check_counter("head", head, M - 1);
  device.check_counter("count", count, M);
  const Tensor slots = torch::stable::new_empty(dense_labels, {B});
  dispatch(z, bank, [&](auto type, auto bank_type) {
    EnqueueParams<typename decltype(type)::type, typename decltype(bank_type)::type> p;
    p.bank = data_of(bank, bank_type);
    p.bank_labels = bank_labels.mutable_data_ptr<int64_t>();
    p.bank_ids = data_of<int64_t>(bank_ids);
    p.bank_steps = data_of<int64_t>(bank_steps);
    p.sums = sums.mutable_data_ptr<double>();
    p.head = head.mutable_data_ptr<int64_t>();
    p.count = count.mutable_data_ptr<int64_t>();
    p.z = data_in(dense_z, type);
    p.labels = dense_labels.const_data_ptr<int64_t>();
    p.ids = dense_ids.data<int64_t>();
    p.step = data_in<int64_t>(step);
    p.mask = rows_mask.data<bool>();
    p.scale = scale.const_data_ptr<double>();
    p.shift = shift.const_data_ptr<double>();
    p.slots = slots.mutable_data_ptr<int64_t>();
    p.B = B;
    p.M = M;
    p.D = D;
    device.run([&](const auto& on) { return enqueue(p, on); });
  });
  return slots;
}

}  // namespace xbn::glue
