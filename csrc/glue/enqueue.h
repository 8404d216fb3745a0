// enqueue_ between torch and its kernel.
#pragma once

#include "../kernels.h"
#include "contract.h"
#include "dispatch.h"

namespace xbn::glue {

// The ring, or the slots of one from `first` on. All its tensors are written.
struct Ring {
  Tensor bank, bank_labels, sums, head, count;
  OptionalTensor bank_ids, bank_steps;
  int64_t first = 0;
  std::optional<int64_t> ring_size = {};  // none: the bank is all of it

  int64_t size() const { return ring_size.value_or(bank.size(0)); }
};

// What is read besides the batch.
struct Stored {
  Tensor labels;
  OptionalTensor mask;
  Tensor scale, shift;
  OptionalTensor ids, step;
};

// A batch to be stored, its operands dense, and room for where its rows went.
struct Storing {
  Storing(const Contract& c, const Ring& ring, const Tensor& batch, const Stored& stored) : r(ring), s(stored) {
    c.bank("bank", r.bank);
    const int64_t M = r.bank.size(0), D = r.bank.size(1);
    c.require(M > 0 || r.ring_size, "bank must have at least one row");
    c.require(r.first >= 0, "first must not be negative, got ", r.first);
    c.require(r.size() > 0 && r.first + M <= r.size(), "ring_size must have room for first + M = ", r.first + M,
              " slots, got ", r.size());
    c.labels("bank_labels", r.bank_labels, "[M]", M);
    c.contiguous("bank_labels", r.bank_labels);
    c.statistic("sums", r.sums, "[2, D]", {2, D});
    c.counter("head", r.head);
    c.counter("count", r.count);
    c.matrix("z", batch, "[B, D]", {-1, D});
    const int64_t B = batch.size(0);
    c.labels("labels", s.labels, "[B]", B);
    c.rows_mask("mask", s.mask, B);
    c.statistic("scale", s.scale, "[D]", {D});
    c.statistic("shift", s.shift, "[D]", {D});
    for (const auto& [name, t] : {std::pair("bank_ids", &r.bank_ids), std::pair("bank_steps", &r.bank_steps)}) {
      if (!*t) continue;
      c.labels(name, **t, "[M]", M);
      c.contiguous(name, **t);
    }
    c.require(r.bank_ids.has_value() || !s.ids, "ids need bank_ids to be stored in");
    if (s.ids) c.labels("ids", *s.ids, "[B]", B);
    c.require(r.bank_steps.has_value() == s.step.has_value(), "bank_steps and step go together");
    if (s.step) c.counter("step", *s.step);
    z = as_dense(batch);
    labels = as_dense(s.labels);
    ids = Dense(s.ids);
    mask = Dense(s.mask);
    slots = torch::stable::new_empty(labels, {B});
  }

  std::vector<Argument> written() const {
    return {{"bank", r.bank},
            {"bank_labels", r.bank_labels},
            {"sums", r.sums},
            {"head", r.head},
            {"count", r.count},
            {"bank_ids", r.bank_ids},
            {"bank_steps", r.bank_steps}};
  }

  template <typename T, typename S>
  EnqueueParams<T, S> params(Type<T> type, Type<S> bank_type) const {
    EnqueueParams<T, S> p;
    p.bank = data_of(r.bank, bank_type);
    p.bank_labels = r.bank_labels.mutable_data_ptr<int64_t>();
    p.bank_ids = data_of<int64_t>(r.bank_ids);
    p.bank_steps = data_of<int64_t>(r.bank_steps);
    p.sums = r.sums.mutable_data_ptr<double>();
    p.head = r.head.mutable_data_ptr<int64_t>();
    p.count = r.count.mutable_data_ptr<int64_t>();
    p.z = data_in(z, type);
    p.labels = labels.const_data_ptr<int64_t>();
    p.ids = ids.data<int64_t>();
    p.step = data_in<int64_t>(s.step);
    p.mask = mask.data<bool>();
    p.scale = s.scale.const_data_ptr<double>();
    p.shift = s.shift.const_data_ptr<double>();
    p.slots = slots.mutable_data_ptr<int64_t>();
    p.B = z.size(0);
    p.M = r.size();
    p.D = r.bank.size(1);
    p.first = r.first;
    p.rows = r.bank.size(0);
    return p;
  }

  const Ring r;
  const Stored s;
  Tensor z, labels;
  Dense ids, mask;
  Tensor slots;
};

template <typename Device>
Tensor enqueue(Tensor bank, Tensor bank_labels, Tensor sums, Tensor head, Tensor count, const Tensor& z,
               const Tensor& labels, const OptionalTensor& mask, const Tensor& scale, const Tensor& shift,
               OptionalTensor bank_ids, const OptionalTensor& ids, OptionalTensor bank_steps,
               const OptionalTensor& step, int64_t first, std::optional<int64_t> ring_size) {
  const Contract c("enqueue_", bank);
  const Storing s(c, {bank, bank_labels, sums, head, count, bank_ids, bank_steps, first, ring_size}, z,
                  {labels, mask, scale, shift, ids, step});
  check_apart("enqueue_", s.written(),
              {{"z", s.z},
               {"labels", s.labels},
               {"ids", s.ids.tensor},
               {"mask", s.mask.tensor},
               {"scale", scale},
               {"shift", shift},
               {"step", step}});
  const Device device("enqueue_", bank);
  device.check_counter("head", head, s.r.size() - 1);
  device.check_counter("count", count, s.r.size());
  dispatch(z, bank, [&](auto type, auto bank_type) {
    device.run([&](const auto& on) { return enqueue(s.params(type, bank_type), on); });
  });
  return s.slots;
}

}  // namespace xbn::glue
