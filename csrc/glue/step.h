// step_ between torch and its kernels: those of the other ops in turn, and two of its own, in cpu/step.cpp and
// cuda/step.cu.
#pragma once

#include "loss_of_batch.h"
#include "loss_of_memory.h"

namespace xbn::glue {

// A copy, if it shares memory with anything that is written.
inline Tensor kept_apart(const Tensor& t, const std::vector<Argument>& written) {
  const Argument argument("", t);
  for (const Argument& w : written)
    if (argument.shares_memory_with(w)) return torch::stable::clone(t);
  return t;
}

inline OptionalTensor kept_apart(const OptionalTensor& t, const std::vector<Argument>& written) {
  return t ? OptionalTensor(kept_apart(*t, written)) : t;
}

// The batch's two sides: the rows that rank and those that are ranked, normalised where that is asked for. With `sides`
// [2 B, D] the two differ: a learned temperature divides the first.
struct Batch {
  Batch(const Contract& c, const Tensor& x, int64_t D, const OptionalTensor& sides, bool normalizes, double eps) {
    c.matrix("x", x, "[B, D]", {-1, D});
    c.eps(eps);
    if (normalizes) normalizing.emplace(c, x, eps);
    z = normalizes ? normalizing->z : as_dense(x);
    anchors = rows = z;
    if (!sides) return;
    c.require(!normalizes, "sides are of a batch that is normalised");
    c.matrix("sides", *sides, "[2 B, D]", {2 * x.size(0), D});
    c.dtype("sides", *sides, x.scalar_type(), "of the dtype of x");
    const Tensor dense = as_dense(*sides);
    anchors = torch::stable::narrow(const_cast<Tensor&>(dense), 0, 0, x.size(0));
    rows = torch::stable::narrow(const_cast<Tensor&>(dense), 0, x.size(0), x.size(0));
  }

  std::optional<Normalizing> normalizing;
  Tensor z, anchors, rows;
};

// Who ranks, and which rows: what the losses are told of masks, ids and the warm-up, known only on the device.
struct StepPairs {
  // slots: where the batch is stored before it ranks; or none
  StepPairs(const OptionalTensor& its_mask, const OptionalTensor& its_ids, const OptionalTensor& its_slots,
            const Tensor& its_step, const Tensor& its_count, int64_t its_warmup_steps, int64_t batch)
      : B(batch),
        warmup_steps(its_warmup_steps),
        mask(its_mask),
        ids(its_ids),
        slots(its_slots),
        step(its_step),
        count(its_count),
        ranked(count),
        exclude(its_slots) {  // without ids, a row's is its slot
    if (its_mask) anchors = torch::stable::new_empty(*its_mask, {B});
    if (its_ids) exclude = torch::stable::new_empty(*its_ids, {B});
    if (warmup_steps > 0) ranked = torch::stable::new_empty(count, {});
  }

  bool are_to_be_made() const { return anchors || ids.tensor || warmup_steps > 0; }

  StepPairsParams params() const {
    StepPairsParams p;
    p.mask = mask.data<bool>();
    p.ids = ids.data<int64_t>();
    p.slots = data_in<int64_t>(slots);
    p.step = step.const_data_ptr<int64_t>();
    p.count = count.const_data_ptr<int64_t>();
    p.B = B;
    p.warmup_steps = warmup_steps;
    p.anchors = data_of<bool>(anchors);
    p.exclude = ids.tensor ? data_of<int64_t>(exclude) : nullptr;
    p.ranked = warmup_steps > 0 ? ranked.mutable_data_ptr<int64_t>() : nullptr;
    return p;
  }

  const int64_t B, warmup_steps;
  const Dense mask, ids;
  const OptionalTensor slots;
  const Tensor step, count;
  Tensor ranked;                    // how many rows of the bank
  OptionalTensor anchors, exclude;  // as the losses take them
};

inline Tensor transposed(Tensor matrix) { return torch::stable::transpose(matrix, 0, 1); }

template <typename Device>
std::tuple<Tensor, Tensor> step(
    Tensor bank, Tensor bank_labels, Tensor bank_ids, Tensor bank_steps, Tensor sums, Tensor head, Tensor count,
    Tensor scale, Tensor shift, Tensor target_mean, Tensor target_std, Tensor variance, Tensor innovation, Tensor step,
    OptionalTensor pairs, OptionalTensor drift_stats, const Tensor& x, const OptionalTensor& sides,
    const Tensor& given_labels, const OptionalTensor& mask, const OptionalTensor& given_ids, const std::string& loss,
    const std::vector<double>& parameters, bool follows, std::optional<double> process_noise, double measurement_noise,
    std::optional<double> fixed_gain, bool deferred, bool stores_first, bool normalizes, bool renormalize,
    double own_weight, double memory_weight, bool center_gradient, int64_t warmup_steps, double eps, bool need_grad) {
  constexpr const char* op = "step_";
  const Contract c(op, bank);
  for (const auto& [name, t] :
       {std::pair("bank", &bank), std::pair("bank_labels", &bank_labels), std::pair("bank_ids", &bank_ids),
        std::pair("bank_steps", &bank_steps), std::pair("sums", &sums), std::pair("head", &head),
        std::pair("count", &count), std::pair("scale", &scale), std::pair("shift", &shift),
        std::pair("target_mean", &target_mean), std::pair("target_std", &target_std), std::pair("variance", &variance),
        std::pair("innovation", &innovation), std::pair("step", &step)})
    c.given(name, *t);
  c.given("x", x);
  c.given("labels", given_labels);

  // What the kernels take. Nothing of the memory is written before all of it is checked.
  const MappedBank mapped(c, bank, sums, scale, shift, count);
  const int64_t M = bank.size(0), D = bank.size(1);
  const Batch batch(c, x, D, sides, normalizes, eps);
  const int64_t B = x.size(0);
  const Tracking tracking(
      c, D, {target_mean, target_std, variance, innovation, scale, shift, sums, count, drift_stats, "drift_stats"},
      {process_noise, measurement_noise, fixed_gain, eps});
  c.counter("step", step);
  if (pairs) c.statistic("pairs", *pairs, "[2]", {2});
  c.require(!(center_gradient && sides), "center_gradient is of a batch without sides");
  c.require(std::isfinite(own_weight) && std::isfinite(memory_weight), "weights must be finite");
  const LossSpec spec = parse_loss(op, loss, parameters);
  const Ring ring{bank, bank_labels, sums, head, count, bank_ids, bank_steps};
  std::vector<Argument> written = {{"bank_labels", bank_labels},
                                   {"bank_ids", bank_ids},
                                   {"bank_steps", bank_steps},
                                   {"bank", bank},
                                   {"sums", sums},
                                   {"head", head},
                                   {"count", count},
                                   {"step", step},
                                   {"pairs", pairs}};
  for (const Argument& argument : tracking.written()) written.push_back(argument);
  const Tensor labels = kept_apart(as_dense(given_labels), written);
  const Dense ids(kept_apart(given_ids, written));
  const Measurement measured(c, batch.z, mask);
  const Storing storing(c, ring, batch.z, {labels, mask, scale, shift, ids.tensor, step});
  check_apart(op, written, {{"x", batch.z}, {"sides", batch.anchors}, {"mask", mask}});

  const OptionalTensor slots = stores_first ? OptionalTensor(storing.slots) : OptionalTensor();
  const StepPairs chosen(mask, ids.tensor, slots, step, count, warmup_steps, B);
  const OptionalTensor ids_of_bank = ids.tensor ? OptionalTensor(bank_ids) : OptionalTensor();
  const Ranking ranking(
      c, batch.anchors, labels, bank, bank_labels,
      {chosen.ranked, scale, shift, ids_of_bank, chosen.exclude, chosen.anchors, renormalize, eps, need_grad}, pairs);
  const Tensor dots = torch::stable::new_empty(batch.z, {B, B});
  const OwnRanking own(c, dots, {labels, ids.tensor, chosen.anchors}, renormalize && !normalizes && !sides, eps,
                       need_grad);
  const Tensor own_anchors = torch::stable::new_empty(batch.z, {need_grad ? B : 0, D});  // derivatives of the own loss
  const Tensor own_rows = torch::stable::new_empty(batch.z, {need_grad ? B : 0, D});     // by the two sides
  const Tensor value = torch::stable::new_empty(batch.z, {});
  const Tensor mean_gradient = torch::stable::new_empty(sums, {D}), along = torch::stable::new_empty(sums, {B});
  const Tensor grad = torch::stable::new_empty(batch.z, {need_grad ? (sides ? 2 * B : B) : 0, D});

  const Device device(op, bank);
  device.check_counter("head", head, M - 1);
  device.check_counter("count", count, M);
  dispatch(x, bank, [&](auto type, auto bank_type) {
    using T = typename decltype(type)::type;
    using S = typename decltype(bank_type)::type;
    const auto run = [&](const auto& kernel) { device.run(kernel); };
    const bool ranks_memory = memory_weight != 0, ranks_own = own_weight != 0;
    TransformParams<S> pending = mapped.params(bank_type);
    pending.step = step.template const_data_ptr<int64_t>();
    MemoryLossParams<T, S> against = ranking.params(type, bank_type);
    if (ranks_memory) device.check_way(against, spec);

    if (normalizes) run([&](const auto& on) { return normalize(batch.normalizing->params(type), on); });

    // The bank follows the drift; where it can, in the sweep that ranks the batch against it.
    TrackParams filter = tracking.params();
    filter.only_measures = !follows;
    run([&](const auto& on) { return track(measured.params(type), filter, on); });
    const bool moves = follows && !deferred, moves_in_sweep = moves && ranks_memory && !stores_first;
    if (moves && !moves_in_sweep) run([&](const auto& on) { return transform(pending, on); });
    if (follows && deferred)
      run([&](const auto& on) { return standardize(mapped.standardize_params(bank_type, eps), on); });

    const auto store = [&] { run([&](const auto& on) { return enqueue(storing.params(type, bank_type), on); }); };
    if (stores_first) store();

    if (chosen.are_to_be_made()) run([&](const auto& on) { return step_pairs(chosen.params(), on); });

    StepTotalParams<T> total{};
    if (ranks_own) {
      device.multiply(batch.anchors, transposed(batch.rows), dots);
      run([&](const auto& on) { return batch_loss(own.params(type), spec, on); });
      total.own_loss = data_in(own.value, type);
      if (need_grad) {
        device.multiply(own.grad_dots, batch.rows, own_anchors);
        device.multiply(transposed(own.grad_dots), batch.anchors, own_rows);
        total.own_anchors = data_in(own_anchors, type);
        total.own_rows = data_in(own_rows, type);
      }
    }
    if (ranks_memory) {
      if (moves_in_sweep)
        run([&](const auto& on) { return transform_memory_loss(pending, against, spec, on); });
      else
        run([&](const auto& on) { return memory_loss(against, spec, on); });
      total.memory_loss = data_in(ranking.value, type);
      if (need_grad) total.grad_memory = data_in(ranking.grad_z, type);
      if (need_grad && center_gradient) {
        total.mean_gradient = mean_gradient.template mutable_data_ptr<double>();
        total.along = along.template mutable_data_ptr<double>();
        total.ranking = data_in(batch.anchors, type);
      }
      total.anchors = data_in<bool>(chosen.anchors);
    }
    if (!stores_first) store();

    total.own_weight = own_weight;
    total.memory_weight = memory_weight;
    total.loss = data_of(value, type);
    total.step = step.template mutable_data_ptr<int64_t>();
    if (!ranks_memory) total.no_pairs = data_of<double>(pairs);
    if (normalizes) {
      total.z = data_in(batch.z, type);
      total.norm = batch.normalizing->norm.template const_data_ptr<double>();
    }
    total.B = B;
    total.D = D;
    total.eps = eps;
    if (need_grad) total.grad = data_of(grad, type);
    if (need_grad && sides) total.grad_rows = total.grad + B * D;
    run([&](const auto& on) { return step_total(total, on); });
  });
  return {value, grad};
}

template <typename Device, typename Library>
void register_step_ops(Library& m) {
  m.impl("step_", TORCH_BOX(&xbn::glue::step<Device>));
}

}  // namespace xbn::glue
