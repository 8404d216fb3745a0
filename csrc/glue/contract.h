// What each op accepts. Every backend calls check_<op> first, so nothing is written on bad input, and the
// message names the op and the argument. Only shapes, dtypes, devices and layouts are looked at: reading a
// value would make a GPU wait.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "../math/losses.h"
#include "tensor.h"

namespace xbn {

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << ']';
  return s.str();
}

// Checks the tensors of one call of one op, all on the device of the first.
class Contract {
 public:
  Contract(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  // `shape` as words for the message, `sizes` as numbers; -1 takes any size.
  void shape(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] < 0 || t.size(d) == sizes[d];
    check(same, op_, ": ", name, " must be ", words, describe(sizes), ", got ", shape_of(t));
    check(t.device() == device_, op_, ": ", name, " is on another device than the other arguments");
  }
  void floating(const char* name, const Tensor& t) const {
    const ScalarType dtype = t.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op_, ": ", name,
          " must be float32 or float64, got ", dtype);
  }
  void dtype(const char* name, const Tensor& t, ScalarType expected, const char* word) const {
    check(t.scalar_type() == expected, op_, ": ", name, " must be ", word, ", got ", t.scalar_type());
  }
  void contiguous(const char* name, const Tensor& t) const {
    check(t.is_contiguous(), op_, ": ", name, " must be contiguous");
  }
  // A matrix of embeddings.
  void matrix(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    floating(name, t);
    columns(name, t, words, std::move(sizes));
  }
  // A bank of dimension D, or of any.
  void bank(const char* name, const Tensor& t, int64_t D = -1) const {
    const ScalarType dtype = t.scalar_type();
    if (dtype != ScalarType::Half && dtype != ScalarType::BFloat16)
      check(dtype == ScalarType::Float || dtype == ScalarType::Double, op_, ": ", name,
            " must be float32, float64, float16 or bfloat16, got ", dtype);
    columns(name, t, "[M, D]", {-1, D});
    contiguous(name, t);
  }
  void columns(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    shape(name, t, words, std::move(sizes));
    check(t.size(1) > 0, op_, ": ", name, " must have at least one column");
  }
  void labels(const char* name, const Tensor& t, const char* words, int64_t n) const {
    shape(name, t, words, {n});
    dtype(name, t, ScalarType::Long, "int64");
  }
  void rows_mask(const char* name, const OptionalTensor& t, int64_t B) const {
    if (!t) return;
    shape(name, *t, "[B]", {B});
    dtype(name, *t, ScalarType::Bool, "bool");
  }
  // State of the memory: float64 or int64, written in place.
  void statistic(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    shape(name, t, words, std::move(sizes));
    dtype(name, t, ScalarType::Double, "float64");
    contiguous(name, t);
  }
  void counter(const char* name, const Tensor& t) const {
    shape(name, t, "a scalar", {});
    dtype(name, t, ScalarType::Long, "int64");
  }

 private:
  static std::string describe(const std::vector<int64_t>& sizes) {
    std::ostringstream s;
    s << " (";
    for (size_t d = 0; d < sizes.size(); ++d) {
      s << (d ? ", " : "");
      sizes[d] < 0 ? s << "any" : s << sizes[d];
    }
    s << ')';
    return sizes.empty() ? "" : s.str();
  }

  const char* op_;
  torch::stable::Device device_;
};

// An argument that may be missing, by its name.
struct Argument {
  Argument(const char* its_name, const Tensor& t) : name(its_name), begin(address(t)), end(begin + bytes(t)) {}
  Argument(const char* its_name, const OptionalTensor& t) : name(its_name) {
    if (t) *this = Argument(its_name, *t);
  }
  bool shares_memory_with(const Argument& other) const { return begin < other.end && other.begin < end; }

  const char* name;
  uintptr_t begin = UINTPTR_MAX, end = 0;  // of its memory; as they stand here, none

 private:
  static uintptr_t bytes(const Tensor& t) { return static_cast<uintptr_t>(t.numel() * t.element_size()); }
  static uintptr_t address(const Tensor& t) {
    return t.numel() > 0 ? reinterpret_cast<uintptr_t>(t.const_data_ptr()) : UINTPTR_MAX;
  }
};

// What an op writes shares no memory with what it reads, nor with anything else it writes: rows would be overwritten
// before they are read. All tensors are dense.
inline void check_apart(const char* op, std::initializer_list<Argument> written, std::initializer_list<Argument> read) {
  for (const Argument* w = written.begin(); w != written.end(); ++w) {
    for (const Argument& r : read)
      check(!r.shares_memory_with(*w), op, ": ", r.name, " must not share memory with ", w->name);
    for (const Argument* other = written.begin(); other != w; ++other)
      check(!w->shares_memory_with(*other), op, ": ", w->name, " must not share memory with ", other->name);
  }
}

// Not below what float32 holds: a norm is divided by at least eps.
inline void check_eps(const char* op, double eps) {
  check(eps >= 1e-30 && std::isfinite(eps), op, ": eps must be positive (at least 1e-30) and finite, got ", eps);
}

inline void check_normalize(const Tensor& x, double eps) {
  Contract("normalize", x).matrix("x", x, "[B, D]", {-1, -1});
  check_eps("normalize", eps);
}

inline void check_normalize_backward(const Tensor& grad_z, const Tensor& z, const Tensor& norm, double eps) {
  const Contract c("normalize_backward", z);
  c.matrix("z", z, "[B, D]", {-1, -1});
  c.shape("grad_z", grad_z, "[B, D]", {z.size(0), z.size(1)});
  c.dtype("grad_z", grad_z, z.scalar_type(), "of the dtype of z");
  c.statistic("norm", norm, "[B]", {z.size(0)});
  check_eps("normalize_backward", eps);
}

inline void check_moments(const Tensor& x, const OptionalTensor& mask) {
  const Contract c("moments", x);
  c.matrix("x", x, "[B, D]", {-1, -1});
  c.rows_mask("mask", mask, x.size(0));
}

inline void check_track(const Tensor& target_mean, const Tensor& target_std, const Tensor& variance,
                        const Tensor& scale, const Tensor& shift, const Tensor& x, const OptionalTensor& mask,
                        const Tensor& sums, const Tensor& count, double process_noise, double measurement_noise,
                        std::optional<double> fixed_gain, double eps, const OptionalTensor& stats) {
  const Contract c("track_", x);
  c.matrix("x", x, "[B, D]", {-1, -1});
  const int64_t D = x.size(1);
  c.rows_mask("mask", mask, x.size(0));
  c.statistic("target_mean", target_mean, "[D]", {D});
  c.statistic("target_std", target_std, "[D]", {D});
  c.statistic("variance", variance, "a scalar", {});
  c.statistic("scale", scale, "[D]", {D});
  c.statistic("shift", shift, "[D]", {D});
  c.statistic("sums", sums, "[2, D]", {2, D});
  c.counter("count", count);
  if (stats) c.statistic("stats", *stats, "[3]", {3});
  check(process_noise >= 0, "track_: process_noise must not be negative, got ", process_noise);
  check(measurement_noise > 0 && std::isfinite(measurement_noise),
        "track_: measurement_noise must be positive and finite, got ", measurement_noise);
  check(!fixed_gain || (*fixed_gain >= 0 && *fixed_gain <= 1), "track_: fixed_gain must be within [0, 1]");
  check_eps("track_", eps);
}

inline void check_transform(const Tensor& bank, const Tensor& sums, const Tensor& scale, const Tensor& shift,
                            const Tensor& count, const char* op = "transform_") {
  const Contract c(op, bank);
  c.bank("bank", bank);
  const int64_t D = bank.size(1);
  c.statistic("sums", sums, "[2, D]", {2, D});
  c.statistic("scale", scale, "[D]", {D});
  c.statistic("shift", shift, "[D]", {D});
  c.counter("count", count);
}

inline void check_standardize(const Tensor& bank, const Tensor& sums, const Tensor& scale, const Tensor& shift,
                              const Tensor& count, double eps) {
  check_transform(bank, sums, scale, shift, count, "standardize_");
  check_eps("standardize_", eps);
}

inline void check_enqueue(const Tensor& bank, const Tensor& bank_labels, const Tensor& sums, const Tensor& head,
                          const Tensor& count, const Tensor& z, const Tensor& labels, const OptionalTensor& mask,
                          const Tensor& scale, const Tensor& shift, const OptionalTensor& bank_ids,
                          const OptionalTensor& ids, const OptionalTensor& bank_steps, const OptionalTensor& step) {
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
  c.labels("labels", labels, "[B]", z.size(0));
  c.rows_mask("mask", mask, z.size(0));
  c.statistic("scale", scale, "[D]", {D});
  c.statistic("shift", shift, "[D]", {D});
  for (const auto& [name, t] : {std::pair("bank_ids", &bank_ids), std::pair("bank_steps", &bank_steps)}) {
    if (!*t) continue;
    c.labels(name, **t, "[M]", M);
    c.contiguous(name, **t);
  }
  check(bank_ids.has_value() || !ids, "enqueue_: ids need bank_ids to be stored in");
  if (ids) c.labels("ids", *ids, "[B]", z.size(0));
  check(bank_steps.has_value() == step.has_value(), "enqueue_: bank_steps and step go together");
  if (step) c.counter("step", *step);
}

inline void check_memory_loss(const Tensor& z, const Tensor& labels, const Tensor& bank, const Tensor& bank_labels,
                              const OptionalTensor& count, const OptionalTensor& scale, const OptionalTensor& shift,
                              const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                              const OptionalTensor& anchors, double eps, const char* op = "memory_loss") {
  const Contract c(op, z);
  c.matrix("z", z, "[B, D]", {-1, -1});
  const int64_t B = z.size(0), D = z.size(1);
  c.labels("labels", labels, "[B]", B);
  c.bank("bank", bank, D);
  c.labels("bank_labels", bank_labels, "[M]", bank.size(0));
  if (count) c.counter("count", *count);
  check(scale.has_value() == shift.has_value(), op, ": scale and shift go together");
  if (scale) c.statistic("scale", *scale, "[D]", {D});
  if (shift) c.statistic("shift", *shift, "[D]", {D});
  check(exclude.has_value() || !bank_ids, op, ": bank_ids are for exclude, which is missing");
  if (bank_ids) c.labels("bank_ids", *bank_ids, "[M]", bank.size(0));
  if (exclude) c.labels("exclude", *exclude, "[B]", B);
  c.rows_mask("anchors", anchors, B);
  check_eps(op, eps);
}

inline void check_transform_memory_loss(const Tensor& bank, const Tensor& sums, const Tensor& scale,
                                        const Tensor& shift, const Tensor& count, const Tensor& z, const Tensor& labels,
                                        const Tensor& bank_labels, const OptionalTensor& ranked,
                                        const OptionalTensor& bank_ids, const OptionalTensor& exclude,
                                        const OptionalTensor& anchors, double eps) {
  constexpr const char* op = "transform_memory_loss_";
  check_transform(bank, sums, scale, shift, count, op);
  check_memory_loss(z, labels, bank, bank_labels, std::nullopt, scale, shift, bank_ids, exclude, anchors, eps, op);
  if (ranked) Contract(op, bank).counter("ranked", *ranked);
}

inline void check_batch_loss(const Tensor& dots, const Tensor& labels, const OptionalTensor& ids,
                             const OptionalTensor& anchors, double eps) {
  const Contract c("batch_loss", dots);
  c.floating("dots", dots);
  const int64_t B = labels.dim() == 1 ? labels.size(0) : dots.size(0);
  c.shape("dots", dots, "[B, B]", {B, B});
  c.labels("labels", labels, "[B]", B);
  if (ids) c.labels("ids", *ids, "[B]", B);
  c.rows_mask("anchors", anchors, B);
  check_eps("batch_loss", eps);
}

inline void check_peak_fma(int64_t threads, int64_t rounds) {
  check(threads >= 1, "_peak_fma: threads must be at least 1, got ", threads);
  check(rounds >= 1, "_peak_fma: rounds must be at least 1, got ", rounds);
}

// The loss by its name in xbn_ext/losses.py and its parameters in the order of losses.h.
inline LossSpec parse_loss(const char* op, const std::string& name, const std::vector<double>& parameters) {
  struct Known {
    const char* name;
    LossKind kind;
    size_t parameters;
  };
  constexpr Known all[] = {
      {"contrastive", LossKind::contrastive, 2},
      {"contrastive_mean", LossKind::contrastive, 2},
      {"supcon", LossKind::supcon, 1},
      {"ntxent", LossKind::ntxent, 1},
      {"multi_similarity", LossKind::multi_similarity, 4},
      {"circle", LossKind::circle, 2},
      {"triplet_hardest", LossKind::triplet, 1},
      {"triplet_all", LossKind::triplet_all, 1},
  };
  const auto known = std::find_if(std::begin(all), std::end(all), [&](const Known& k) { return name == k.name; });
  check(known != std::end(all), op, ": unknown loss '", name, "'");
  check(parameters.size() == known->parameters, op, ": ", name, " takes ", known->parameters, " parameters, got ",
        parameters.size());
  for (const double x : parameters) check(std::isfinite(x), op, ": the parameters of ", name, " must be finite");
  const auto parameter = [&](size_t k) { return k < parameters.size() ? parameters[k] : 0.0; };
  LossSpec loss;
  loss.kind = known->kind;
  loss.mean = name == "contrastive_mean";
  loss.a = parameter(0);
  loss.b = parameter(1);
  loss.c = parameter(2);
  if (loss.kind == LossKind::multi_similarity) loss.mining = parameter(3);
  const bool divides = loss.kind == LossKind::supcon || loss.kind == LossKind::ntxent;
  const auto in_range = [](double x) { return x >= 1e-30 && x <= 1e30; };  // float32 holds it and its reciprocal
  check(!divides || in_range(loss.a), op, ": the temperature of ", name, " must be within [1e-30, 1e30], got ", loss.a);
  if (loss.kind == LossKind::multi_similarity)
    check(in_range(loss.a) && in_range(loss.b), op, ": alpha and beta must be within [1e-30, 1e30], got ", loss.a,
          " and ", loss.b);
  if (loss.kind == LossKind::circle) check(in_range(loss.b), op, ": gamma must be within [1e-30, 1e30], got ", loss.b);
  return loss;
}

}  // namespace xbn
