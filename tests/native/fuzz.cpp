// The CPU kernels without torch, on random shapes: compiled with ASan and UBSan, then with TSan, by
// tests/test_sanitizers.py; by other compilers and for other processors by tests/test_compilers.py, which compares the
// sum that is printed. Numbers are checked by the Python tests; here only finiteness and the promise of the same bits
// on any threads, with the screen and without.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/loss/screen.h"
#include "../../csrc/kernels.h"
#include "random_data.h"

namespace {

double sum = 0;  // of all losses and gradients, each squeezed into (-1, 1)

template <typename T>
void add_to_sum(const Exactly<T>& values) {
  for (int64_t i = 0; i < values.size; ++i) {
    const double x = static_cast<double>(values[i]);
    if (std::isfinite(x)) sum += x / (1 + std::fabs(x));
  }
}

void serial(int64_t units, int64_t, const std::function<void(int64_t)>& unit) {
  for (int64_t i = 0; i < units; ++i) unit(i);
}

void threaded(int64_t units, int64_t, const std::function<void(int64_t)>& unit) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int64_t i = t; i < units; i += kThreads) unit(i);
    });
  for (std::thread& thread : threads) thread.join();
}

// The rows of a batch made of unit length, and the gradient through that. Draws no numbers.
template <typename T>
void normalize_round(xbn::Isa isa, const Exactly<T>& batch, int64_t B, int64_t D) {
  const xbn::Cpu one{isa, serial}, many{isa, threaded};
  const Exactly<T> x(B * D), grad_z(B * D), z(B * D), z_again(B * D), grad(B * D), grad_again(B * D);
  const Exactly<double> norm(B);
  for (int64_t k = 0; k < B * D; ++k)
    x[k] = k < B * D - D ? batch[k] : static_cast<T>(0), grad_z[k] = batch[B * D - 1 - k];
  xbn::normalize(xbn::NormalizeParams<T>{x, B, D, 1e-6, z, norm}, many);
  xbn::normalize(xbn::NormalizeParams<T>{x, B, D, 1e-6, z_again, norm}, one);
  xbn::normalize_backward(xbn::NormalizeBackwardParams<T>{grad_z, z, norm, B, D, 1e-6, grad}, many);
  xbn::normalize_backward(xbn::NormalizeBackwardParams<T>{grad_z, z, norm, B, D, 1e-6, grad_again}, one);
  for (const auto& [a, b] : {std::pair(&z, &z_again), std::pair(&grad, &grad_again)})
    require(std::memcmp(a->data.get(), b->data.get(), B * D * sizeof(T)) == 0, "normalize differs", B, 0, D);
  add_to_sum(z);
  add_to_sum(grad);
}

// The end of a step: its loss, and its gradient from up to three.
template <typename T>
void step_round(xbn::Isa isa, const Exactly<T>& batch, int64_t B, int64_t D) {
  const xbn::Cpu one{isa, serial}, many{isa, threaded};
  const Exactly<T> z(B * D), values(2), loss(1), grad(B * D), grad_again(B * D), rows(B * D), rows_again(B * D);
  const Exactly<T> of_anchors = normal<T>(B * D), of_rows = normal<T>(B * D), of_memory = normal<T>(B * D);
  const Exactly<double> norm(B);
  const Exactly<int64_t> step(1);
  values[0] = 2, values[1] = 3, *step = 7;
  xbn::normalize(xbn::NormalizeParams<T>{batch, B, D, 1e-6, z, norm}, one);
  const int parts = up_to(2);
  xbn::StepTotalParams<T> p{};
  if (parts != 0) p.own_loss = values, p.own_anchors = of_anchors, p.own_rows = of_rows;
  if (parts != 1) p.memory_loss = static_cast<T*>(values) + 1, p.grad_memory = of_memory;
  p.own_weight = 0.5, p.memory_weight = 0.25, p.loss = loss, p.step = step, p.B = B, p.D = D, p.eps = 1e-6;
  const bool sides_differ = up_to(1) == 1;
  if (!sides_differ && up_to(1)) p.z = z, p.norm = norm;
  p.grad = grad, p.grad_rows = sides_differ ? static_cast<T*>(rows) : nullptr;
  const Exactly<double> center(D), along(B);
  const Exactly<bool> ranks = mask(B);
  const bool is_finite = std::all_of(z.data.get(), z.data.get() + B * D, [](T x) { return std::isfinite(x); });
  if (parts != 1 && is_finite && up_to(1)) {  // one row that is not finite makes the mean so
    p.mean_gradient = center, p.along = along, p.ranking = z,
    p.anchors = up_to(1) ? static_cast<bool*>(ranks) : nullptr;
  }
  const auto is_anchor = [&](int64_t i) { return p.anchors == nullptr || p.anchors[i]; };
  xbn::step_total(p, many);
  if (p.mean_gradient != nullptr)
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0, count = 0;
      for (int64_t i = 0; i < B; ++i)
        if (is_anchor(i))
          sum += static_cast<double>(of_memory[i * D + d]) - along[i] * static_cast<double>(z[i * D + d]), ++count;
      require(std::fabs(center[d] - sum / std::max(count, 1.0)) <= 1e-12, "mean_gradient differs", B, 0, D);
    }
  require(*loss == (parts != 0 ? 1 : 0) + (parts != 1 ? 0.75 : 0) && *step == 8, "step_total's loss differs", B, 0, D);
  if (p.norm == nullptr)
    for (int64_t k = 0; k < B * D; ++k) {
      const double ranked = parts != 0 ? 0.5 * static_cast<double>(of_rows[k]) : 0;
      const double ranking = (parts != 0 ? 0.5 * static_cast<double>(of_anchors[k]) : 0) +
                             (parts != 1 ? 0.25 * static_cast<double>(of_memory[k]) : 0) -
                             (p.mean_gradient != nullptr && is_anchor(k / D) ? 0.25 * center[k % D] : 0);
      const double expected = sides_differ ? ranking : ranking + ranked;
      require(std::fabs(static_cast<double>(grad[k]) - expected) <= 1e-6 * (1 + std::fabs(ranking) + std::fabs(ranked)),
              "step_total's gradient differs", B, 0, D);
      require(!sides_differ || std::fabs(static_cast<double>(rows[k]) - ranked) <= 1e-6 * std::fabs(ranked),
              "step_total's gradient by the rows differs", B, 0, D);
    }
  p.grad = grad_again, p.grad_rows = sides_differ ? static_cast<T*>(rows_again) : nullptr;
  xbn::step_total(p, one);
  for (const auto& [a, b] : {std::pair(&grad, &grad_again), std::pair(&rows, &rows_again)})
    require(std::memcmp(a->data.get(), b->data.get(), B * D * sizeof(T)) == 0, "step_total differs", B, 0, D);
  add_to_sum(grad);
}

// Some rows of a batch against all of it.
template <typename T>
void part_of_batch_round(xbn::Isa isa, const xbn::BatchLossParams<T>& batch, const xbn::LossSpec& loss,
                         bool need_grad) {
  const xbn::Cpu one{isa, serial}, many{isa, threaded};
  const int64_t A = up_to(batch.B), first = up_to(batch.B - A);
  const Exactly<T> dots(A * batch.B), grad(A * batch.B), grad_again(A * batch.B);
  const Exactly<double> totals(7), totals_again(7);
  const Exactly<bool> chosen(A);
  std::copy_n(batch.dots + first * batch.B, dots.size, dots.data.get());
  if (batch.anchors != nullptr) std::copy_n(batch.anchors + first, A, chosen.data.get());
  xbn::BatchSumsParams<T> p = batch;
  p.dots = dots, p.A = A, p.first = first, p.totals = totals, p.grad_dots = need_grad ? static_cast<T*>(grad) : nullptr;
  if (batch.anchors != nullptr) p.anchors = chosen;
  xbn::batch_sums(p, loss, many);
  p.totals = totals_again, p.grad_dots = need_grad ? static_cast<T*>(grad_again) : nullptr;
  xbn::batch_sums(p, loss, one);
  require(std::memcmp(totals, totals_again, 7 * sizeof(double)) == 0, "part of a batch: totals", A, batch.B, first);
  if (need_grad && grad.size > 0)
    require(std::memcmp(grad, grad_again, grad.size * sizeof(T)) == 0, "part of a batch: gradient", A, batch.B, first);
  add_to_sum(totals);
  add_to_sum(grad);
}

// One pass through all ops on a memory of random shape and fill.
template <typename T, typename S>
void one_round(xbn::Isa isa, int64_t B, int64_t M, int64_t D) {
  const auto screening = up_to(1) != 0 ? xbn::Screening::always : xbn::Screening::automatic;
  const xbn::Cpu one{isa, serial, xbn::Screening::never}, many{isa, threaded, screening};
  Exactly<T> z = normal<T>(B * D);
  Exactly<int64_t> y = labels(B, 5), bank_y = labels(M, 5), slots(B), head(1), count(1), rows(1);
  Exactly<int64_t> ids = labels(B, 9), bank_ids = labels(M, 9), bank_steps(M), step(1);
  Exactly<bool> chosen = mask(B);
  Exactly<S> bank = normal<S>(M * D, up_to(1) ? 20 : 1);  // off standard, or not
  Exactly<double> sums(2 * D), mean(D), std(D), target_mean(D), target_std(D), variance(1), innovation(D), scale(D),
      shift(D), stats(3);
  *count = up_to(M);
  *head = up_to(M - 1);
  *variance = INFINITY;
  std::fill(scale.data.get(), scale.data.get() + D, 1.0);
  if (B > 1 && up_to(1)) z[D] = NAN;
  normalize_round(isa, z, B, D);
  step_round(isa, z, B, D);

  xbn::transform(xbn::TransformParams<S>{bank, sums, scale, shift, count, M, D}, one);

  const xbn::MomentsParams<T> measured{z, sometimes(chosen), B, D, mean, std, rows};
  xbn::moments(measured, one);
  xbn::track(measured,
             xbn::TrackParams{target_mean, target_std, variance, up_to(1) ? static_cast<double*>(innovation) : nullptr,
                              scale, shift, sums, count, D, 0.01, 1.0, up_to(1) ? -1.0 : 0.1, 1e-6, false, stats},
             many);
  if (up_to(1))
    xbn::standardize(xbn::StandardizeParams<S>{{bank, sums, scale, shift, count, M, D}, sums, count, 1e-6}, many);
  else
    xbn::transform(xbn::TransformParams<S>{bank, sums, scale, shift, count, M, D}, many);
  const int64_t first = up_to(3) == 0 ? up_to(M) : 0, rows_here = first > 0 ? up_to(M - first) : M;  // of a part
  xbn::enqueue(xbn::EnqueueParams<T, S>{static_cast<S*>(bank) + first * D,
                                        static_cast<int64_t*>(bank_y) + first,
                                        static_cast<int64_t*>(bank_ids) + first,
                                        static_cast<int64_t*>(bank_steps) + first,
                                        sums,
                                        head,
                                        count,
                                        z,
                                        y,
                                        sometimes(ids),
                                        step,
                                        sometimes(chosen),
                                        scale,
                                        shift,
                                        slots,
                                        B,
                                        M,
                                        D,
                                        first,
                                        rows_here},
               many);
  require(*count >= 0 && *count <= M && *head >= 0 && *head < M, "ring", B, M, D);
  for (int64_t k = 0; k < *count * D; ++k) require(std::isfinite(xbn::as<double>(bank[k])), "bank", B, M, D);

  const bool pending = up_to(1), need_grad = up_to(3) > 0;
  Exactly<T> value(1), grad(B * D), value_again(1), grad_again(B * D);
  Exactly<double> pairs(2);
  xbn::MemoryLossParams<T, S> p{};
  p.z = z, p.labels = y, p.bank = bank, p.bank_labels = bank_y, p.count = count;
  p.B = B, p.M = M, p.D = D;
  p.exclude = sometimes(slots), p.anchors = sometimes(chosen);
  p.renormalize = up_to(1) == 1, p.eps = 1e-6;
  p.loss = value, p.pairs = pairs;
  if (up_to(1)) p.bank_ids = bank_ids, p.exclude = ids;
  if (pending) p.scale = scale, p.shift = shift;
  if (need_grad) p.grad_z = grad;
  const xbn::LossSpec loss = random_loss();
  xbn::memory_loss(p, loss, many);
  p.loss = value_again;
  if (need_grad) p.grad_z = grad_again;
  xbn::memory_loss(p, loss, one);
  require(std::memcmp(value, value_again, sizeof(T)) == 0, "loss differs between thread counts", B, M, D);
  if (need_grad && B > 0)
    require(std::memcmp(grad, grad_again, B * D * sizeof(T)) == 0, "gradient differs between thread counts", B, M, D);
  add_to_sum(value);
  add_to_sum(grad);

  // The same pass by pass, as of a bank in one part.
  const xbn::Program program = xbn::make_program(loss);
  const Exactly<xbn::RowSums> all(2 * B), sums_of_pass(2 * B), sums_again(2 * B);
  const Exactly<T> grads(2 * B * D), grads_again(2 * B * D);
  const Exactly<double> given(B), factors(2 * B), totals(7);
  for (int k = 0; k < program.passes && !xbn::goes_in_rounds(loss); ++k) {
    xbn::MemorySumsParams<T, S> part{p};
    part.number = k, part.first = 7, part.given = k > 0 ? static_cast<double*>(given) : nullptr;
    part.sums = sums_of_pass, part.grad_z = need_grad ? static_cast<T*>(grads) : nullptr;
    xbn::memory_sums(part, loss, many);
    part.sums = sums_again, part.grad_z = need_grad ? static_cast<T*>(grads_again) : nullptr;
    xbn::memory_sums(part, loss, one);
    require(B == 0 || std::memcmp(sums_of_pass, sums_again, 2 * B * sizeof(xbn::RowSums)) == 0, "part: sums", B, M, D);
    if (need_grad && B > 0)
      require(std::memcmp(grads, grads_again, 2 * B * D * sizeof(T)) == 0, "part: gradient", B, M, D);
    for (int64_t i = 0; i < 2 * B; ++i)
      if (program.pass[k].slot[i / B].pairs != xbn::Pairs::none) all[i] = sums_of_pass[i];
    xbn::settle_sums({all, p.anchors, 1, B, k + 1, given, factors, totals}, loss, many);
  }
  add_to_sum(grads);

  // The same with a map that is written into the bank in the same sweep.
  const auto bank_as_moved = [&](const xbn::Cpu& cpu) {
    Exactly<S> moved(M * D);
    Exactly<double> a(D), b(D);
    std::copy(bank.data.get(), bank.data.get() + M * D, moved.data.get());
    for (int64_t d = 0; d < D; ++d) a[d] = 1 + 0.1 * static_cast<double>(d % 3), b[d] = 0.1;
    p.bank = moved, p.scale = a, p.shift = b;
    xbn::transform_memory_loss(xbn::TransformParams<S>{moved, sums, a, b, count, M, D}, p, loss, cpu);
    return moved;
  };
  const Exactly<S> moved = bank_as_moved(many);
  p.loss = value;
  const Exactly<S> moved_again = bank_as_moved(one);
  require(std::memcmp(value, value_again, sizeof(T)) == 0, "moved: loss", B, M, D);
  require(std::memcmp(moved, moved_again, M * D * sizeof(S)) == 0, "moved: bank", B, M, D);

  const Exactly<T> dots = normal<T>(B * B), grad_dots(B * B), grad_dots_again(B * B);
  for (int64_t i = 0; i < B; ++i) dots[i * B + i] = std::fabs(dots[i * B + i]);
  xbn::BatchLossParams<T> batch{};
  batch.dots = dots, batch.labels = y, batch.ids = sometimes(ids), batch.anchors = p.anchors;
  batch.A = B, batch.B = B, batch.renormalize = p.renormalize, batch.eps = 1e-6, batch.loss = value;
  if (need_grad) batch.grad_dots = grad_dots;
  xbn::batch_loss(batch, loss, many);
  batch.loss = value_again;
  if (need_grad) batch.grad_dots = grad_dots_again;
  xbn::batch_loss(batch, loss, one);
  require(std::memcmp(value, value_again, sizeof(T)) == 0, "batch: loss differs between thread counts", B, M, D);
  if (need_grad && B > 0)
    require(std::memcmp(grad_dots, grad_dots_again, B * B * sizeof(T)) == 0, "batch: gradient differs", B, M, D);
  add_to_sum(value);
  add_to_sum(grad_dots);
  part_of_batch_round(isa, batch, loss, need_grad);
}

// There is work for many threads, whatever the shape.
void plan_round(int64_t B, int64_t M, int64_t D) {
  const xbn::SweepPlan plan = xbn::SweepPlan::make(B, M, D, sizeof(float));
  const int64_t last = plan.blocks - (plan.groups - 1) * plan.group_blocks;
  require(plan.splits * plan.split_rows >= M && (plan.splits - 1) * plan.split_rows < M, "plan: splits", B, M, D);
  require(0 < last && last <= plan.group_blocks && plan.group_blocks <= last + plan.groups - 1, "plan: groups", B, M,
          D);
  require(plan.splits >= (M >= 1 << 16 ? 32 : std::min<int64_t>(M / 1000, 4)), "plan: few units", B, M, D);
}

// The screen must find each pair whose similarity is above the margin by float64, or by what float32 may make of it, and
// none that is far below.
void screen_round(const xbn::ByteProducts& products, int64_t D) {
  const int64_t B = 1 + up_to(xbn::kAnchorBlock - 1), rows = xbn::kTileUnit * (1 + up_to(3));
  const double length = std::pow(10.0, static_cast<double>(up_to(4) - 2));
  const bool worst = up_to(1) != 0;  // codes leave nearly half a step of every coordinate, and all of it adds up
  const Exactly<float> side = normal<float>(D);
  const auto badly_coded = [&](int64_t d, double code) {
    return d == 0 ? 1.0 : std::copysign(static_cast<double>(up_to(20)) + 0.49, side[d]) / code;
  };
  const Exactly<float> z = normal<float>(B * D);
  for (int64_t k = 0; k < B * D; ++k)
    z[k] = static_cast<float>(length * (worst ? badly_coded(k % D, products.anchor_code) : z[k]));
  const Exactly<float> no_bank(0);
  const Exactly<int64_t> y = labels(B, 5);
  xbn::MemoryLossParams<float, float> p{};
  p.z = z, p.labels = y, p.B = B, p.M = 1000, p.D = D;
  const xbn::Sweep<float> sweep(p);
  const int64_t padded = sweep.plan.padded_dim;
  const xbn::CodedAnchors anchors(z, B, D, sweep, 0, products);

  const Exactly<float> bank(rows * padded), per_unit(rows);
  const Exactly<double> per_step(rows), inverse(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const double size = std::pow(10.0, static_cast<double>(up_to(24) - 12));
    const int64_t kind = up_to(2), i = up_to(B - 1);  // some lean towards an anchor, some have one large coordinate
    double square = 0, largest = 0;
    for (int64_t d = 0; d < padded; ++d) {
      double u = normal<float>(1)[0];
      if (kind == 0) u += 3 * z[i * D + d % D] / length;
      if (kind == 1 && d == i % D) u *= 100;
      if (worst) u = d < D ? badly_coded(d, products.row_code) : 0;
      bank[r * padded + d] = d < D ? static_cast<float>(size * u) : 0;
      square += std::pow(static_cast<double>(bank[r * padded + d]), 2);
      largest = std::max(largest, std::fabs(static_cast<double>(bank[r * padded + d])));
    }
    inverse[r] = static_cast<float>(1 / std::max(std::sqrt(square), 1e-6));
    per_unit[r] = static_cast<float>(products.row_code / largest);
    per_step[r] = products.row_code / (largest * inverse[r]);
  }
  Exactly<uint8_t> codes(rows * padded);
  products.encode(bank, rows, padded, per_unit, codes);

  double longest = 0, top = 0;
  Exactly<double> norm(B), similarity(rows * B);
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      const double x = z[i * D + d];
      norm[i] += x * x;
      top = std::max(top, std::fabs(x));
      for (int64_t r = 0; r < rows; ++r) similarity[r * B + i] += x * bank[r * padded + d] * inverse[r];
    }
    norm[i] = std::sqrt(norm[i]);
    longest = std::max(longest, norm[i]);
  }
  for (int round = 0; round < 20; ++round) {
    const int64_t at = up_to(rows * B - 1);  // the margin is next to one of the similarities
    const double margin = similarity[at] - 1e-6 * norm[at % B];
    Exactly<int32_t> limits(rows);
    for (int64_t r = 0; r < rows; ++r)
      limits[r] =
          static_cast<int32_t>(std::clamp(anchors.slope(margin) * per_step[r] - anchors.offset(), -2e9, 2e9)) - 1;
    Exactly<uint64_t> found(rows);
    xbn::Prefetch none(nullptr, 0, 1);
    // By one limit for all anchors, or one for each, which here is the same.
    const Exactly<float> slope(xbn::kAnchorBlock), per_step_32(rows);
    std::fill_n(slope.data.get(), xbn::kAnchorBlock, static_cast<float>(anchors.slope(margin) * (1 - 4e-7)));
    if (anchors.slope(margin) < 0)
      std::fill_n(slope.data.get(), xbn::kAnchorBlock, static_cast<float>(anchors.slope(margin) * (1 + 4e-7)));
    std::copy_n(per_step.data.get(), rows, per_step_32.data.get());
    const float offset = static_cast<float>(anchors.offset() * (1 + 4e-7) + 1);
    const int32_t* const of_row = round % 2 == 0 ? limits.data.get() : nullptr;
    products.find(codes, rows, padded, anchors.codes(), anchors.start(), {of_row, slope, per_step_32, offset}, none,
                  found);
    for (int64_t k = 0; k < rows * B; ++k) {
      const int64_t r = k / B, i = k % B;
      const bool is_found = (found[r] >> i & 1) != 0;
      require(is_found || similarity[k] <= margin + 5e-7 * norm[i], "screen: a pair is not out", B, rows, D);
      // What codes leave, if all of it adds up.
      const double left = longest / per_step[r] + top / products.anchor_code;
      require(!is_found || similarity[k] > margin - 2 * std::sqrt(D) * left, "screen: a pair is out", B, rows, D);
    }
  }
}

}  // namespace

// fuzz ROUNDS [best]: on every instruction set that this processor has, or on its best.
int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const xbn::Isa best = xbn::cpu_isa(), least = argc > 2 ? best : xbn::Isa::baseline;
  for (int round = 0; round < rounds; ++round) {
    const int64_t B = up_to(round % 4 == 0 ? 300 : 70), M = 1 + up_to(300), D = 1 + up_to(round % 4 == 1 ? 300 : 70);
    for (const int64_t rows : {M, 1000 * M}) plan_round(1 + up_to(4096), rows, 1 + up_to(4096));
    for (const xbn::Isa isa :
         {xbn::Isa::baseline, xbn::Isa::avx2, xbn::Isa::avx_vnni, xbn::Isa::avx512, xbn::Isa::avx512_vnni}) {
      if (isa < least || isa > best || !xbn::has_isa(isa)) continue;  // ordered from least to best
      if (const xbn::ByteProducts* products = xbn::byte_products(isa)) {
        const auto before = generator;  // what is drawn next is the same with any instruction set
        for (int k = 0; k < 20; ++k) screen_round(*products, xbn::kLeastScreenedDim + up_to(500));
        generator = before;
      }
      // Half of the pairs of dtypes, with all sizes.
      int pair = round / 4;
#define XBN_ROUND(S, ...) pair++ % 2 == 0 ? one_round<float, S>(isa, B, M, D) : one_round<double, S>(isa, B, M, D);
      {
        using namespace xbn;
        XBN_FOR_EACH_BANK(XBN_ROUND)
      }
#undef XBN_ROUND
    }
  }
  std::printf("%d rounds, best instruction set %s, sum %.9g\n", rounds, xbn::isa_name(best).c_str(), sum);
}
