// The CUDA kernels, executed on the CPU, against the CPU kernels in float64, on random shapes, orders of threads and
// numbers of multiprocessors. For the sanitizers: tests/test_sanitizers.py builds it with ASan and UBSan, then with
// TSan.
#include <executor.h>

#include <cstring>
#include <vector>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cuda/gpu.h"
#include "../../csrc/cuda/loss/way.h"
#include "../../csrc/kernels.h"
#include "products.h"
#include "state.h"

namespace {

using namespace xbn;

int compared = 0;  // losses, with their gradients

const Cpu kCpu{Isa::baseline, [](int64_t units, int64_t, const std::function<void(int64_t)>& unit) {
                 for (int64_t i = 0; i < units; ++i) unit(i);
               }};

// Gives temporary memory of exactly the size asked for, full of NaN.
struct ExactGpu : cuda::Gpu {
  ExactGpu() { multiprocessors = emu::settings().multiprocessors, shared_memory = emu::settings().shared_memory; }

  void* workspace(int64_t bytes) const override {
    kept.emplace_back(static_cast<char*>(std::aligned_alloc(256, static_cast<std::size_t>(bytes))), std::free);
    std::fill(kept.back().get(), kept.back().get() + bytes, static_cast<char>(0xff));
    return kept.back().get();
  }

  void multiply_transposed(const Product& p) const override {
    p.float64 ? multiply_transposed_of<double>(p) : multiply_transposed_of<float>(p);
  }
  void add_product(const Product& p) const override {
    p.float64 ? add_product_of<double>(p) : add_product_of<float>(p);
  }

  mutable std::vector<std::unique_ptr<char, decltype(&std::free)>> kept;

 private:
  template <typename T>
  static void multiply_transposed_of(const Product& p) {
    ::multiply_transposed(static_cast<const T*>(p.a), static_cast<const T*>(p.b), p.n, p.m, p.k,
                          static_cast<T*>(p.out));
  }
  template <typename T>
  static void add_product_of(const Product& p) {
    ::add_product(static_cast<const T*>(p.a), static_cast<const T*>(p.b), p.n, p.m, p.k, static_cast<T*>(p.out));
  }
};

// Calls an op's kernels, which may not fail.
template <typename Run>
void launch(const Run& run) {
  const int error = run(ExactGpu());
  if (error != 0) std::fprintf(stderr, "%s\n", cuda::error_string(error));
  require(error == 0, "launch", 0, 0, 0);
}

template <typename T, typename S>
MemoryLossParams<T, S> loss_params(const Exactly<T>& z, const Exactly<int64_t>& y, const State<S>& s, const Sizes& n,
                                   const MemoryLossParams<T, S>& options, const Exactly<T>& value,
                                   const Exactly<T>& grad, const Exactly<double>& pairs) {
  MemoryLossParams<T, S> p = options;
  p.z = z, p.labels = y, p.bank = s.bank, p.bank_labels = s.labels, p.count = s.count;
  p.B = n.B, p.M = n.M, p.D = n.D;
  p.loss = value, p.grad_z = grad, p.pairs = pairs;
  return p;
}

// Up to three chunks: as planned, one would hold all of these small banks.
int64_t rows_of_chunk(int64_t M) { return 64 * std::max<int64_t>(1, ceil_div(M, 64 * (1 + up_to(2)))); }

template <typename T, typename S>
cuda::Chunks some_chunks(const MemoryLossParams<T, S>& p, const LossSpec& loss) {
  cuda::Chunks chunks = cuda::plan_chunks(p.B, p.M, p.D, sizeof(T), loss);
  chunks.rows = rows_of_chunk(p.M);
  return chunks;
}

template <typename T, typename S>
void composite(const MemoryLossParams<T, S>& p, const LossSpec& loss) {
  cuda::Chunks chunks = some_chunks(p, loss);
  if (chunks.thresholds > 16 && up_to(3) == 0) {  // some rounds
    chunks.thresholds = std::max<int64_t>(16, (p.M + 3) / 4);
    chunks.rounds = ceil_div(p.M, chunks.thresholds);
  }
  launch([&](const cuda::Gpu& gpu) { return cuda::composite(p, loss, chunks, gpu); });
}

template <typename T>
Exactly<T> sevens(int64_t n) {
  Exactly<T> x(n);
  std::memset(static_cast<void*>(x.data.get()), 7, static_cast<std::size_t>(n) * sizeof(T));
  return x;
}

template <typename T>
bool all_zero(const T* x, int64_t n) {
  return std::all_of(x, x + n, [](T value) { return value == 0; });
}

// settle_sums, the same as on a CPU.
void settle(const SettleSumsParams& p, const LossSpec& loss, const Sizes& n) {
  const Exactly<double> given(p.B), scale(p.n * kSlots * p.B), totals(7);
  SettleSumsParams of_cpu = p;
  of_cpu.given = given, of_cpu.scale = scale, of_cpu.totals = totals;
  settle_sums(of_cpu, loss, kCpu);
  launch([&](const cuda::Gpu& gpu) { return cuda::settle_sums(p, loss, gpu); });
  const auto compare = [&](const char* what, const double* ours, const Exactly<double>& truth) {
    Exactly<double> values(truth.size);
    std::copy_n(ours, truth.size, values.data.get());
    close(what, difference(values, truth, 1), 1e-12, n);
  };
  compare("settle_sums, given", p.given, given);
  compare("settle_sums, scale", p.scale, scale);
  compare("settle_sums, totals", p.totals, totals);
}

// The loss against a bank that is cut into up to three parts, some of them empty: memory_sums and settle_sums.
template <typename T, typename S>
void in_parts(const MemoryLossParams<T, S>& p, const LossSpec& loss) {
  const Sizes sizes{p.B, p.M, p.D};
  const int64_t n = 1 + up_to(2), of_slot = p.B * p.D;
  std::vector<int64_t> bounds{0, p.M};
  while (static_cast<int64_t>(bounds.size()) <= n) bounds.push_back(up_to(p.M));
  std::sort(bounds.begin(), bounds.end());
  const Exactly<int64_t> numbers(p.M), count(1);
  for (int64_t j = 0; j < p.M; ++j) numbers[j] = j;
  const Program program = make_program(loss);
  const Exactly<RowSums> parts(n * kSlots * p.B);
  const Exactly<T> grads(n * kSlots * of_slot);
  const Exactly<double> given = sevens<double>(p.B), scale = sevens<double>(n * kSlots * p.B), totals(7);
  for (int number = 0; number < program.passes; ++number) {
    for (int64_t k = 0; k < n; ++k) {
      const int64_t first = bounds[k];
      const Exactly<RowSums> sums = sevens<RowSums>(kSlots * p.B);
      const Exactly<T> grad = sevens<T>(kSlots * of_slot);
      MemorySumsParams<T, S> part{p};
      part.M = bounds[k + 1] - first;
      part.bank += first * p.D, part.bank_labels += first;
      part.bank_ids = (p.bank_ids != nullptr ? p.bank_ids : numbers) + first;
      *count = std::clamp<int64_t>(*p.count - first, 0, part.M);
      part.count = count;
      part.grad_z = p.grad_z != nullptr ? static_cast<T*>(grad) : nullptr;
      part.number = number, part.first = first, part.given = number > 0 ? static_cast<double*>(given) : nullptr;
      part.sums = sums;
      launch([&](const cuda::Gpu& gpu) { return cuda::composite_sums(part, loss, some_chunks(part, loss), gpu); });
      for (int slot = 0; slot < kSlots; ++slot) {
        const bool fills = program.pass[number].slot[slot].pairs != Pairs::none;
        for (int64_t i = 0; i < p.B; ++i) {
          const RowSums& of_row = sums[slot * p.B + i];
          const T* const its_grad = grad + (slot * p.B + i) * p.D;
          if (fills && (p.anchors == nullptr || p.anchors[i])) {
            parts[(k * kSlots + slot) * p.B + i] = of_row;
            if (p.grad_z != nullptr) std::copy_n(its_grad, p.D, grads + ((k * kSlots + slot) * p.B + i) * p.D);
          } else {
            require(all_zero(&of_row.value, 4) && (p.grad_z == nullptr || all_zero(its_grad, p.D)),
                    "memory_sums: not zero", p.B, p.M, p.D);
          }
        }
      }
    }
    settle({parts, p.anchors, n, p.B, number + 1, given, scale, totals}, loss, sizes);
  }
  const LossSum sum{{totals[0], totals[1]}, {totals[2], totals[3]}, totals[4], totals[5], totals[6]};
  *p.loss = static_cast<T>(sum.loss());
  sum.store_pairs(p.pairs);
  for (int64_t at = 0; at < of_slot && p.grad_z != nullptr; ++at) {
    const int64_t i = at / p.D;
    const bool finite = std::all_of(p.z + i * p.D, p.z + (i + 1) * p.D, [](T x) { return std::isfinite(x); });
    double grad = finite ? 0.0 : static_cast<double>(NAN);
    for (int64_t k = 0; k < n * kSlots; ++k)
      if (const double factor = scale[k * p.B + i]; factor != 0)
        grad += sum.average(group_of(loss, static_cast<int>(k % kSlots))) * factor *
                static_cast<double>(grads[k * of_slot + at]);
    p.grad_z[at] = static_cast<T>(grad);
  }
}

// Rows of about unit length; one may be NaN.
template <typename T>
Exactly<T> batch(int64_t B, int64_t D) {
  Exactly<T> z = normal<T>(B * D, 1 / std::sqrt(static_cast<double>(D)));
  if (B > 1 && up_to(3) == 0) z[D] = NAN;
  return z;
}

// The rows of a batch made of unit length, and the gradient through that.
template <typename T>
void normalize_round(const Sizes& n) {
  const Exactly<T> x = batch<T>(n.B, n.D), grad_z = normal<T>(n.B * n.D), z(n.B * n.D), grad(n.B * n.D);
  if (n.B > 2 && up_to(1)) std::fill(x.data.get(), x.data.get() + n.D, static_cast<T>(0));
  const Exactly<double> x64 = doubles(x), grad_z64 = doubles(grad_z), z64(n.B * n.D), grad64(n.B * n.D), norm(n.B),
                        norm64(n.B);
  normalize(NormalizeParams<double>{x64, n.B, n.D, 1e-6, z64, norm64}, kCpu);
  normalize_backward(NormalizeBackwardParams<double>{grad_z64, z64, norm64, n.B, n.D, 1e-6, grad64}, kCpu);
  launch([&](const cuda::Gpu& gpu) { return cuda::normalize(NormalizeParams<T>{x, n.B, n.D, 1e-6, z, norm}, gpu); });
  launch([&](const cuda::Gpu& gpu) {
    return cuda::normalize_backward(NormalizeBackwardParams<T>{grad_z, z, norm, n.B, n.D, 1e-6, grad}, gpu);
  });
  close("normalize", difference(z, z64, 1), 4 * kUnit<T>, n);
  close("normalize, norm", difference(norm, norm64), 1e-13, n);
  // Only the part of the gradient across the row is left, in one dimension nothing: rounding is as large as the whole.
  double whole = 1e-300;
  for (int64_t i = 0; i < n.B * n.D; ++i)
    if (const double norm_i = norm64[i / n.D]; norm_i == norm_i)
      whole = std::max(whole, std::fabs(grad_z64[i]) / std::max(norm_i, 1e-6));
  close("normalize, gradient", difference(grad, grad64, whole), 20 * kUnit<T>, n);
}

// The end of a step: its loss, its gradient from up to three, and what is asked before of ids and masks.
template <typename T>
void step_round(const Sizes& n) {
  const int64_t B = n.B, D = n.D;
  const Exactly<T> z = batch<T>(B, D), values = normal<T>(2), of_anchors = normal<T>(B * D), of_rows = normal<T>(B * D),
                   of_memory = normal<T>(B * D), loss(1), grad(B * D), rows(B * D);
  const Exactly<double> norm(B), loss64(1), grad64(B * D), rows64(B * D),
      z64 = doubles(z), values64 = doubles(values), of_anchors64 = doubles(of_anchors), of_rows64 = doubles(of_rows),
      of_memory64 = doubles(of_memory);
  const Exactly<double> center(D), center64(D), along(B), along64(B);
  const Exactly<bool> ranks = mask(B);
  const Exactly<int64_t> step(1), step64(1);
  for (int64_t i = 0; i < B; ++i) norm[i] = i == 1 ? 1e-9 : 0.5 + static_cast<double>(up_to(9));
  const int parts = up_to(2);
  const bool sides_differ = up_to(1) == 1, normalized = !sides_differ && up_to(2) > 0, need_grad = up_to(3) > 0,
             centers = up_to(1) == 1;
  const bool* who = sometimes(ranks);
  const auto params = [&](auto* losses, auto* anchors, auto* ranked, auto* memory, auto* unit, auto* value, auto* out,
                          auto* out_rows, int64_t* count, double* mean, double* along_rows) {
    StepTotalParams<std::remove_pointer_t<decltype(losses)>> p{};
    if (parts != 0) p.own_loss = losses, p.own_anchors = anchors, p.own_rows = ranked;
    if (parts != 1) p.memory_loss = losses + 1, p.grad_memory = memory;
    p.own_weight = 0.7, p.memory_weight = 0.2, p.loss = value, p.step = count, p.B = B, p.D = D, p.eps = 1e-6;
    if (normalized) p.z = unit, p.norm = norm;
    if (need_grad) p.grad = out;
    if (need_grad && centers && parts != 1) {
      p.mean_gradient = mean, p.along = along_rows, p.ranking = unit, p.anchors = who;
    }
    if (need_grad && sides_differ) p.grad_rows = out_rows;
    return p;
  };
  step_total(params(values64.data.get(), of_anchors64.data.get(), of_rows64.data.get(), of_memory64.data.get(),
                    z64.data.get(), loss64.data.get(), grad64.data.get(), rows64.data.get(), step64, center64, along64),
             kCpu);
  const auto p = params(values.data.get(), of_anchors.data.get(), of_rows.data.get(), of_memory.data.get(),
                        z.data.get(), loss.data.get(), grad.data.get(), rows.data.get(), step, center, along);
  launch([&](const cuda::Gpu& gpu) { return cuda::step_total(p, gpu); });
  close("step_total", difference(loss, loss64, 1), 4 * kUnit<T>, n);
  close("step_total, gradient", difference(grad, grad64, normalized ? 1e6 : 1), 20 * kUnit<T>, n);
  close("step_total, gradient by the rows", difference(rows, rows64, 1), 4 * kUnit<T>, n);
  require(*step == 1 && *step64 == 1, "step_total counted", n.B, n.M, n.D);

  const Exactly<bool> chosen = mask(B), anchors(B), anchors64(B);
  const Exactly<int64_t> ids = labels(B, 9), slots = labels(B, 9), exclude(B), exclude64(B), ranked(1), ranked64(1);
  for (int64_t i = 0; i < B; ++i) ids[i] -= up_to(3), slots[i] -= up_to(1);
  StepPairsParams q{chosen, ids, sometimes(slots), step, step64, B, up_to(3), anchors, exclude, ranked};
  launch([&](const cuda::Gpu& gpu) { return cuda::step_pairs(q, gpu); });
  q.anchors = anchors64, q.exclude = exclude64, q.ranked = ranked64;
  step_pairs(q, kCpu);
  for (int64_t i = 0; i < B; ++i)
    require(anchors[i] == anchors64[i] && exclude[i] == exclude64[i], "step_pairs differs", n.B, n.M, n.D);
  require(*ranked == *ranked64, "step_pairs differs", n.B, n.M, n.D);
}

// What some rows of a batch add to its loss. Values and counts are compared apart: one may be far larger than the other.
struct PartOfBatch {
  explicit PartOfBatch(int64_t dots) : grad(dots) {}

  template <typename T>
  void take(const double* totals, const Exactly<T>& its_grad) {
    std::copy_n(totals, kSlots, value.data.get());
    std::copy_n(totals + kSlots, counts.size, counts.data.get());
    grad = doubles(its_grad);
  }
  bool is_close(const PartOfBatch& truth, double tolerance) const {
    return difference(value, truth.value, 1) <= tolerance && difference(counts, truth.counts) == 0 &&
           difference(grad, truth.grad, 1) <= tolerance;
  }

  Exactly<double> value{kSlots}, counts{5}, grad;
};

// Some rows of the batch whose loss has just been compared.
template <typename T>
void part_of_batch_round(const Sizes& n, const BatchSumsParams<double>& whole, const Exactly<T>& dots_of_all,
                         const LossSpec& loss, double tolerance) {
  const int64_t A = up_to(n.B), first = up_to(n.B - A);
  const Exactly<T> dots(A * n.B), grad = sevens<T>(A * n.B);
  const Exactly<double> totals(7), grad64(A * n.B);
  const Exactly<bool> chosen(A);
  std::copy_n(dots_of_all.data.get() + first * n.B, dots.size, dots.data.get());
  if (whole.anchors != nullptr) std::copy_n(whole.anchors + first, A, chosen.data.get());
  const bool* const anchors = whole.anchors != nullptr ? static_cast<bool*>(chosen) : nullptr;
  const auto of_cpu = [&](const Exactly<double>& products) {
    PartOfBatch part(grad64.size);
    const BatchSumsParams<double> p{products, whole.labels, whole.ids, anchors, A, n.B, first, totals, grad64};
    batch_sums(p, loss, kCpu);
    part.take(totals, grad64);
    return part;
  };
  const Exactly<double> dots64 = doubles(dots);
  const PartOfBatch truth = of_cpu(dots64);
  for (const double touch : {30 * kUnit<T>, -30 * kUnit<T>})
    if (!of_cpu(touched(dots64, touch)).is_close(truth, tolerance)) return;
  for (T* const grad_dots : {static_cast<T*>(grad), static_cast<T*>(nullptr)}) {
    const BatchSumsParams<T> p{dots, whole.labels, whole.ids, anchors, A, n.B, first, totals, grad_dots};
    launch([&](const cuda::Gpu& gpu) { return cuda::batch_sums(p, loss, gpu); });
    PartOfBatch part(grad.size);
    part.take(totals, grad);
    require(part.is_close(truth, tolerance), "batch_sums", A, n.B, first);
  }
}

// The loss of a batch against itself. False: it could not be compared.
template <typename T>
bool batch_round(const Sizes& n, const LossSpec& loss) {
  const double unit = kUnit<T>;
  const Exactly<T> z = batch<T>(n.B, n.D);
  const Exactly<int64_t> y = labels(n.B, 5);
  Exactly<T> dots(n.B * n.B);
  multiply_transposed(z.data.get(), z.data.get(), n.B, n.B, n.D, dots.data.get());
  const Exactly<double> dots64 = doubles(dots);
  const Exactly<int64_t> ids = labels(n.B, 9);
  const Exactly<bool> chosen = mask(n.B);
  const Exactly<double> value64(1), grad64(n.B * n.B);
  const BatchLossParams<double> p64{
      {dots64, y, sometimes(ids), sometimes(chosen), n.B, n.B, 0, nullptr, grad64}, up_to(1) == 1, 1e-6, value64};
  batch_loss(p64, loss, kCpu);
  const double tolerance = 1000 * unit * (loss.kind == LossKind::contrastive ? 1 : 20);
  for (const double touch : {30 * unit, -30 * unit}) {  // as for the memory below
    const Exactly<double> dots_touched = touched(dots64, touch), value(1), grad(n.B * n.B);
    BatchLossParams<double> p = p64;
    p.dots = dots_touched, p.loss = value, p.grad_dots = grad;
    batch_loss(p, loss, kCpu);
    if (difference(value, value64, 1) > tolerance || difference(grad, grad64) > tolerance) return false;
  }
  const Exactly<T> value(1), grad(n.B * n.B);
  std::fill(grad.data.get(), grad.data.get() + grad.size, static_cast<T>(7));
  for (T* const grad_dots : {static_cast<T*>(grad), static_cast<T*>(nullptr)}) {
    const BatchLossParams<T> p{
        {dots, y, p64.ids, p64.anchors, n.B, n.B, 0, nullptr, grad_dots}, p64.renormalize, 1e-6, value};
    launch([&](const cuda::Gpu& gpu) { return cuda::batch_loss(p, loss, gpu); });
    close("batch_loss", difference(value, value64, 1), tolerance, n);
  }
  close("batch_loss, gradient", difference(grad, grad64, 1e-3), tolerance, n);
  part_of_batch_round(n, p64, dots, loss, tolerance);
  return true;
}

// A batch meets a memory of random fill, whose rows are transformed in place or keep a map that is pending. Before each
// op the truth starts from the very numbers that the kernels see.
template <typename T, typename S>
class MemoryRound {
 public:
  MemoryRound(const Sizes& n, bool in_place) : n_(n), in_place_(in_place) {
    step_memory();
    rewrite_rows();
    store_batch();
  }

  // False: it cannot be compared.
  bool compare(const LossSpec& loss) const {
    const double unit = kUnit<T>;
    const State<double> truth = ours_.in_double();
    MemoryLossParams<T, S> options{};
    options.anchors = sometimes(chosen_);
    options.exclude = sometimes(slots_);
    if (up_to(1)) options.bank_ids = ours_.ids, options.exclude = ids_;
    options.renormalize = up_to(1) == 1;
    options.eps = kEps;
    if (!in_place_) options.scale = ours_.scale, options.shift = ours_.shift;
    MemoryLossParams<double, double> options64{};
    options64.anchors = options.anchors, options64.exclude = options.exclude, options64.bank_ids = options.bank_ids;
    options64.renormalize = options.renormalize, options64.eps = options.eps;
    options64.scale = options.scale, options64.shift = options.shift;
    const Exactly<double> value64(1), grad64(n_.B * n_.D), pairs64(2);
    memory_loss(loss_params(z64_, y_, truth, n_, options64, value64, grad64, pairs64), loss, kCpu);

    // A comparison decides whether a pair counts, or which is the hardest, and a row close to zero has no direction:
    // where a tiny change of the anchors or the map decides otherwise, so may rounding.
    const double tolerance = 1000 * unit * (loss.kind == LossKind::contrastive ? 1 : 20);
    for (const double touch : {unit, -unit}) {  // one of them moves a pair across the line that it is close to
      const Exactly<double> z = touched(z64_, 30 * touch), shift = touched(truth.shift, touch);
      const Exactly<double> value(1), grad(n_.B * n_.D), pairs(2);
      MemoryLossParams<double, double> p = loss_params(z, y_, truth, n_, options64, value, grad, pairs);
      if (!in_place_) p.shift = shift;
      memory_loss(p, loss, kCpu);
      if (difference(value, value64, 1) > tolerance || difference(grad, grad64) > tolerance) return false;
      if (difference(pairs, pairs64) > 1e-12) return false;
    }

    const auto check = [&](const char* what, const auto& run) {
      const Exactly<T> value(1), grad(n_.B * n_.D);
      const Exactly<double> pairs(2);
      std::fill(grad.data.get(), grad.data.get() + grad.size, static_cast<T>(7));
      run(loss_params(z_, y_, ours_, n_, options, value, grad, pairs));
      close(what, difference(value, value64, 1), tolerance, n_);
      close(what, difference(grad, grad64, 1e-3), tolerance, n_);
      close(what, difference(pairs, pairs64, 1), 1e-12, n_);
      compared += 1;
      if (in_place_ || up_to(1)) return;  // the value alone once of four
      auto no_grad = loss_params(z_, y_, ours_, n_, options, value, grad, pairs);
      no_grad.grad_z = nullptr;
      run(no_grad);
      close(what, difference(value, value64, 1), tolerance, n_);
    };
    if constexpr (std::is_same_v<T, float> && !std::is_same_v<S, double>) {
      const bool wide = n_.D * sizeof(S) % 16 == 0;
      for (const bool tensor : {true, false})
        if (!goes_in_rounds(loss) && (tensor ? wide : std::is_same_v<S, float>))
          check(tensor ? "tensor" : "simt", [&](const auto& p) {
            launch([&](const cuda::Gpu& gpu) { return cuda::sweep(p, loss, tensor, gpu); });
          });
      if (!goes_in_rounds(loss) && wide)
        check("halves", [&](const auto& p) {
          launch([&](const cuda::Gpu& gpu) { return cuda::halves(p, loss, rows_of_chunk(p.M), gpu); });
        });
      // Of the pairs the screen may leave as many as it may, then none and all: the sweep runs, then the exact pairs.
      for (const double most : {cuda::kFew, 0.0, 1.0})
        if (cuda::takes_screen(loss) && wide)
          check("screen", [&](const auto& p) {
            launch([&](const cuda::Gpu& gpu) { return cuda::screened(p, loss, most, gpu); });
          });
    }
    check("composite", [&](const auto& p) { composite(p, loss); });
    if (!goes_in_rounds(loss)) check("in parts", [&](const auto& p) { in_parts(p, loss); });
    return true;
  }

 private:
  static constexpr double kEps = 1e-6;

  TrackParams track_params(int64_t D, const auto& s) const {
    double* innovation = adapts_ ? s.innovation.data.get() : nullptr;
    return {s.mean, s.std, s.variance, innovation, s.scale, s.shift, s.sums, s.count, D, adapts_ ? 0 : 0.01,
            1.0,    -1.0,  kEps,       false,      s.stats};
  }

  void step_memory() {
    const Exactly<double> mean(n_.D), std(n_.D), mean64(n_.D), std64(n_.D);
    const Exactly<int64_t> rows(1), rows64(1);
    const MomentsParams<T> m{z_, mask_, n_.B, n_.D, mean, std, rows};
    const MomentsParams<double> m64{z64_, mask_, n_.B, n_.D, mean64, std64, rows64};
    const auto same_moments = [&] {
      close("mean", difference(mean, mean64), 1e-11, n_);
      close("std", difference(std, std64), 1e-11, n_);
      require(*rows == *rows64, "rows", n_.B, n_.M, n_.D);
    };
    if (!std::is_same_v<T, S>) return track(m64, track_params(n_.D, ours_), kCpu);  // the kernels know nothing of S
    const State<double> truth = ours_.in_double();
    track(m64, track_params(n_.D, truth), kCpu);
    launch([&](const cuda::Gpu& gpu) { return cuda::moments(m, gpu); });
    same_moments();
    launch([&](const cuda::Gpu& gpu) { return cuda::track(m, track_params(n_.D, ours_), gpu); });
    same_moments();
    same("track", ours_, truth, 0, 1e-11, n_);
  }

  void rewrite_rows() {
    const State<double> truth = ours_.in_double();
    double terms = 1;  // scale * row and shift may be far larger than their sum
    if (in_place_) {
      for (int64_t d = 0; d < n_.D; ++d) terms = std::max(terms, std::fabs(truth.shift[d]));
      const auto params = [&]<typename R>(const State<R>& s) {
        return TransformParams<R>{s.bank, s.sums, s.scale, s.shift, s.count, n_.M, n_.D};
      };
      transform(params(truth), kCpu);
      const State<S> screened = ours_.copied();
      launch([&](const cuda::Gpu& gpu) { return cuda::transform(params(ours_), gpu); });
      if constexpr (std::is_same_v<T, float> && std::is_same_v<S, float>)
        if (n_.D % 4 == 0) move_in_screen(screened, params(screened), terms);
    } else {
      for (int64_t d = 0; d < n_.D && *truth.count > 0; ++d) {
        const Moments stored = bank_moments(truth.sums[d], truth.sums[n_.D + d], *truth.count);
        if (truth.scale[d] * stored.std >= kEps) terms = std::max(terms, std::fabs(stored.mean / stored.std));
      }
      const auto params = [&]<typename R>(const State<R>& s) {
        return StandardizeParams<R>{{s.bank, s.sums, s.scale, s.shift, s.count, n_.M, n_.D}, s.sums, s.count, kEps};
      };
      standardize(params(truth), kCpu);
      launch([&](const cuda::Gpu& gpu) { return cuda::standardize(params(ours_), gpu); });
    }
    const double computing = 100 * kUnit<typename Compute<S>::type> * terms;
    same(in_place_ ? "transform" : "standardize", ours_, truth, computing + kUnit<S>, computing, n_);
  }

  // A step's rows are moved by the screen: as transform_ has moved them, and the loss is the same.
  void move_in_screen(const State<S>& s, TransformParams<S> moving, double terms) const {
    const LossSpec loss{LossKind::contrastive, Average::pairs, 0.9, 0.1};
    Exactly<int64_t> step(1);
    *step = up_to(1) ? 1024 : 5;
    moving.step = step;
    const auto params = [&](const State<S>& of, const auto& value, const auto& grad, const auto& pairs) {
      MemoryLossParams<T, S> p{};
      p.renormalize = true, p.eps = kEps;
      return loss_params(z_, y_, of, n_, p, value, grad, pairs);
    };
    const Exactly<T> value(1), grad(n_.B * n_.D), expected(1), expected_grad(n_.B * n_.D);
    const Exactly<double> pairs(2), expected_pairs(2);
    const auto p = params(s, value, grad, pairs);
    launch([&](const cuda::Gpu& gpu) {
      return n_.B > 0 ? cuda::screened_in_place(moving, p, loss, 1.0, gpu) : cuda::transform(moving, gpu);
    });
    require(std::memcmp(s.bank, ours_.bank, n_.M * n_.D * sizeof(S)) == 0, "moved rows", n_.B, n_.M, n_.D);
    same("moved by the screen", s, ours_, 1000 * kUnit<S> * terms, 0, n_);
    if (n_.B == 0) return;
    const auto other = params(ours_, expected, expected_grad, expected_pairs);
    launch([&](const cuda::Gpu& gpu) { return cuda::screened(other, loss, 1.0, gpu); });
    close("moved by the screen, loss", difference(value, expected, 1), 100 * kUnit<T>, n_);
    close("moved by the screen, gradient", difference(grad, expected_grad, 1), 100 * kUnit<T>, n_);
    close("moved by the screen, pairs", difference(pairs, expected_pairs, 1), 0, n_);
  }

  // In all of the ring or in a part. A row that does not fit the bank's dtype is left out, so the truth stores in that
  // dtype.
  void store_batch() {
    Exactly<int64_t> step(1);
    *step = 17;
    const int64_t* ids = sometimes(ids_);
    const int64_t first = up_to(1) ? up_to(n_.M) : 0, rows = first > 0 ? up_to(n_.M - first) : n_.M;
    const auto params = [&](const State<S>& s, const Exactly<int64_t>& slots) {
      return EnqueueParams<T, S>{static_cast<S*>(s.bank) + first * n_.D,
                                 static_cast<int64_t*>(s.labels) + first,
                                 static_cast<int64_t*>(s.ids) + first,
                                 static_cast<int64_t*>(s.steps) + first,
                                 s.sums,
                                 s.head,
                                 s.count,
                                 z_,
                                 y_,
                                 ids,
                                 step,
                                 mask_,
                                 s.scale,
                                 s.shift,
                                 slots,
                                 n_.B,
                                 n_.M,
                                 n_.D,
                                 first,
                                 rows};
    };
    const State<S> truth = ours_.copied();
    const Exactly<int64_t> slots(n_.B);
    enqueue(params(truth, slots), kCpu);
    launch([&](const cuda::Gpu& gpu) { return cuda::enqueue(params(ours_, slots_), gpu); });
    same("enqueue", ours_, truth, 1e-11, 0, n_);
    require(std::memcmp(ours_.bank, truth.bank, n_.M * n_.D * sizeof(S)) == 0, "stored rows", n_.B, n_.M, n_.D);
    require(equal(slots_, slots), "slots", n_.B, n_.M, n_.D);
  }

  const Sizes n_;
  const bool in_place_, adapts_ = up_to(1) == 1;
  const Exactly<T> z_ = batch<T>(n_.B, n_.D);
  const Exactly<double> z64_ = doubles(z_);
  const Exactly<int64_t> y_ = labels(n_.B, 5), ids_ = labels(n_.B, 9), slots_{n_.B};
  const Exactly<bool> chosen_ = mask(n_.B);
  const bool* const mask_ = sometimes(chosen_);
  const State<S> ours_ = State<S>::random(n_);
};

// Losses one after the other with the same memory; one that cannot be compared is drawn again with another memory.
template <typename T, typename S, typename... Draw>
void compare_all(const Sizes& n, bool in_place, const Draw&... draw) {
  const MemoryRound<T, S> memory(n, in_place);
  const auto compare = [&](const auto& draw_loss) {
    bool done = memory.compare(draw_loss());
    while (!done) done = MemoryRound<T, S>(n, in_place).compare(draw_loss());
  };
  (compare(draw), ...);
}

}  // namespace

// fuzz SEED ROUNDS B,M,D…: as many rounds of random shapes, then each shape with a memory of float and, with columns for
// 16-byte accesses, one of 16 bits, in place and deferred in turn: that of float with a loss that goes by all ways and
// with the one that goes by the composite way only. A batch against itself where M is 1, for it depends on B and D only.
int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: fuzz SEED ROUNDS B,M,D...\n", stderr), 2;
  const int seed = std::atoi(argv[1]), rounds = std::atoi(argv[2]);
  generator.seed(static_cast<std::uint64_t>(seed));
  int round = seed * rounds;  // the kinds of rounds go on from seed to seed
  const auto vary = [&] {
    emu::settings().seed = static_cast<std::uint64_t>(round++);  // the very first in order of index
    emu::settings().multiprocessors = static_cast<int>(1 + up_to(5));
    emu::settings().shared_memory = (up_to(1) == 0 ? 227 : 99) << 10;
  };
#define XBN_ONE(...) +1
  constexpr int kBankDtypes = 0 XBN_FOR_EACH_BANK(XBN_ONE);
#undef XBN_ONE
  for (const int end = round + rounds; round < end;) {
    const int kind = round;
    vary();
    emu::settings().identities_of_warp = kind % 8 == 0 ? 32 : 2;
    Sizes n{up_to(kind % 3 == 0 ? 140 : 40), 1 + up_to(kind % 3 == 1 ? 260 : 130), 1 + up_to(kind % 3 == 2 ? 200 : 70)};
    if (kind % 8 == 7) n = {1 + up_to(6), 1 + up_to(70), 257 + up_to(767)};          // the wide kernels
    if (kind % 4 == 2) emu::settings().multiprocessors = 1, n.M = 130 + up_to(130);  // blocks of several tiles
    if (up_to(2) == 0) n.D = (n.D + 7) / 8 * 8;                                      // 16-byte accesses
    const bool in_place = up_to(1) == 1;
    const LossSpec loss = random_loss();
    MemoryRound<float, float>(n, in_place).compare(loss);
    if (kind % 4 == 1) MemoryRound<float, double>(n, in_place).compare(loss);
    if (kind % 8 == 3) MemoryRound<float, Float16>(n, in_place).compare(loss);
    if (kind % 8 == 5) MemoryRound<float, BFloat16>(n, in_place).compare(loss);
    int turn = 0;
#define XBN_ROUND(S, ...) \
  if (kind % kBankDtypes == turn++) MemoryRound<double, S>(n, in_place).compare(loss);
    XBN_FOR_EACH_BANK(XBN_ROUND)
#undef XBN_ROUND
    kind % 2 == 0 ? normalize_round<double>(n) : normalize_round<float>(n);
    kind % 2 == 0 ? step_round<double>(n) : step_round<float>(n);
    batch_round<float>(n, loss);
    if (kind % 2 == 0) batch_round<double>(n, loss);
  }
  const auto draw = [&](bool all_ways) {
    LossSpec loss;
    do vary(), loss = random_loss();
    while (goes_in_rounds(loss) == all_ways);
    return loss;
  };
  const auto of_all_ways = [&] { return draw(true); };
  const auto of_one_way = [&] { return draw(false); };
  // Between them these losses run all kernels that depend on the bank's dtype; triplets have one for the chosen rows.
  const auto of_bank = [&] {
    const int64_t kind = up_to(2);
    LossSpec loss;
    do loss = draw(true);
    while (kind == 0 && !cuda::takes_screen(loss));
    return kind == 1 ? LossSpec{LossKind::triplet, Average::anchors, 0.3} : loss;
  };
  int shapes = 0;
  for (; shapes < argc - 3; ++shapes) {
    long long B, M, D;
    if (std::sscanf(argv[3 + shapes], "%lld,%lld,%lld", &B, &M, &D) != 3) return 2;
    const Sizes n{B, M, D};
    emu::settings().identities_of_warp = 2;
    const int turn = seed + shapes;
    compare_all<float, float>(n, turn % 2 == 0, of_all_ways, of_one_way);
    const Sizes wide{B, M, (D + 7) / 8 * 8};
    const bool in_place = turn / 2 % 2 == 0;
    turn % 2 == 0 ? compare_all<float, Float16>(wide, in_place, of_bank)
                  : compare_all<float, BFloat16>(wide, in_place, of_bank);
    normalize_round<float>(n);
    step_round<float>(n);
    for (const bool all_ways : {true, false})
      while (M == 1 && !batch_round<float>(n, draw(all_ways)));
  }
  std::printf("%d rounds, %d shapes, %d losses compared\n", rounds, shapes, compared);
}
