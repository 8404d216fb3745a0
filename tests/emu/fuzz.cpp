// The CUDA kernels, executed on the CPU, against the CPU kernels in float64, on random shapes, orders of threads and
// numbers of multiprocessors. For the sanitizers: tests/test_sanitizers.py builds it with ASan and UBSan, then with
// TSan.
#include <executor.h>

#include <limits>
#include <vector>

#include "../../csrc/cpu/batch_loss.h"
#include "../../csrc/cpu/enqueue.h"
#include "../../csrc/cpu/loss.h"
#include "../../csrc/cpu/moments.h"
#include "../../csrc/cpu/standardize.h"
#include "../../csrc/cpu/track.h"
#include "../../csrc/cpu/transform.h"
#include "../../csrc/cuda/launch.h"
#include "../native/random_data.h"
#include "products.h"

namespace {

using namespace xbn;

struct Sizes {
  int64_t B, M, D;
};

int compared = 0;  // losses, with their gradients

const Cpu kCpu{Isa::baseline, [](int64_t units, const std::function<void(int64_t)>& unit) {
                 for (int64_t i = 0; i < units; ++i) unit(i);
               }};

template <typename T>
Exactly<T> copy(const Exactly<T>& from) {
  Exactly<T> to(from.size);
  std::copy(from.data.get(), from.data.get() + from.size, to.data.get());
  return to;
}

template <typename To, typename From>
Exactly<To> converted(const Exactly<From>& from) {
  Exactly<To> to(from.size);
  for (int64_t i = 0; i < from.size; ++i) to[i] = static_cast<To>(from[i]);
  return to;
}

// Largest difference over the largest value, or over `unit` if that is more; a NaN must be a NaN in both.
template <typename A, typename B>
double difference(const Exactly<A>& a, const Exactly<B>& b, double unit = 1e-300) {
  double largest = unit, off = 0;
  for (int64_t i = 0; i < a.size; ++i) {
    if (std::isnan(static_cast<double>(a[i])) != std::isnan(static_cast<double>(b[i]))) return INFINITY;
    if (std::isnan(static_cast<double>(a[i]))) continue;
    largest = std::max(largest, std::fabs(static_cast<double>(b[i])));
    off = std::max(off, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return off / largest;
}

void close(const char* what, double difference, double tolerance, const Sizes& n) {
  if (!(difference <= tolerance)) std::fprintf(stderr, "off by %g: ", difference);
  require(difference <= tolerance, what, n.B, n.M, n.D);
}

// A launch with temporary memory of exactly the size asked for, full of NaN.
template <typename Run>
void launch(int64_t bytes, const Run& run) {
  const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::aligned_alloc(256, bytes)),
                                                           std::free);
  std::fill(memory.get(), memory.get() + bytes, static_cast<char>(0xff));
  const int error = run(cuda::Launch{nullptr, emu::settings().multiprocessors, memory.get()});
  if (error != 0) std::fprintf(stderr, "%s\n", cuda::error_string(error));
  require(error == 0, "launch", 0, 0, 0);
}

// The state of a memory, by both implementations.
template <typename S>
struct State {
  Exactly<S> bank;
  Exactly<int64_t> labels, ids, steps, head, count;
  Exactly<double> sums, scale, shift, mean, std, variance, gaps;

  static State random(const Sizes& n) {
    const auto doubles = [](int64_t size) { return Exactly<double>(size); };
    State s{normal<S>(n.M * n.D), ::labels(n.M, 5), ::labels(n.M, 9), Exactly<int64_t>(n.M), Exactly<int64_t>(1),
            Exactly<int64_t>(1),  doubles(2 * n.D), doubles(n.D),     doubles(n.D),          doubles(n.D),
            doubles(n.D),         doubles(1),       doubles(2)};
    *s.count = up_to(n.M);
    *s.head = up_to(n.M - 1);
    *s.variance = up_to(1) ? INFINITY : 0.5;
    const bool off_standard = up_to(1) == 1;
    for (int64_t k = 0; k < n.M * n.D; ++k) s.bank[k] *= S(off_standard ? 20 : 1);
    for (int64_t d = 0; d < n.D; ++d) s.scale[d] = 0.5 + 0.1 * static_cast<double>(d % 7), s.shift[d] = 0.1;
    for (int64_t j = 0; j < *s.count; ++j)
      for (int64_t d = 0; d < n.D; ++d) {
        s.sums[d] += static_cast<double>(s.bank[j * n.D + d]);
        s.sums[n.D + d] += static_cast<double>(s.bank[j * n.D + d]) * static_cast<double>(s.bank[j * n.D + d]);
      }
    return s;
  }

  template <typename Other>
  State<Other> as() const {
    return {converted<Other>(bank),
            copy(labels),
            copy(ids),
            copy(steps),
            copy(head),
            copy(count),
            copy(sums),
            copy(scale),
            copy(shift),
            copy(mean),
            copy(std),
            copy(variance),
            copy(gaps)};
  }
};

template <typename A, typename B>
void same(const char* what, const State<A>& ours, const State<B>& truth, double tolerance, const Sizes& n) {
  close(what, difference(ours.bank, truth.bank, 1), tolerance, n);
  close(what, difference(ours.sums, truth.sums, 1), tolerance, n);
  close(what, difference(ours.scale, truth.scale, 1), tolerance, n);
  close(what, difference(ours.shift, truth.shift, 1), tolerance, n);
  close(what, difference(ours.mean, truth.mean), 1e-11, n);
  close(what, difference(ours.std, truth.std), 1e-11, n);
  const auto equal = [](const Exactly<int64_t>& a, const Exactly<int64_t>& b) {
    return std::equal(a.data.get(), a.data.get() + a.size, b.data.get());
  };
  close(what, difference(ours.gaps, truth.gaps, 1), 1e-9, n);
  require(*ours.variance == *truth.variance, what, n.B, n.M, n.D);
  require(equal(ours.ids, truth.ids) && equal(ours.steps, truth.steps), what, n.B, n.M, n.D);
  require(equal(ours.labels, truth.labels) && equal(ours.head, truth.head) && equal(ours.count, truth.count), what, n.B,
          n.M, n.D);
}

template <typename T, typename S>
TrackParams track_params(const MomentsParams<T>& m, State<S>& s) {
  return {m.mean, m.std,   m.rows, s.mean, s.std, s.variance, s.scale, s.shift,
          s.sums, s.count, m.D,    0.01,   1.0,   -1.0,       1e-6,    s.gaps};
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

template <typename T, typename S>
void composite(const MemoryLossParams<T, S>& p, const LossSpec& loss) {
  cuda::Composite<T> c = cuda::plan_composite<T>(p.B, p.M, p.D, loss);
  const int64_t chunks = 1 + up_to(2);  // at most; planned, one would hold all of these small banks
  c.chunk = 64 * ((p.M + 64 * chunks - 1) / (64 * chunks));
  c.chunks = (p.M + c.chunk - 1) / c.chunk;
  if (c.thresholds > 16 && up_to(3) == 0) {  // some rounds
    c.thresholds = std::max<int64_t>(16, (p.M + 3) / 4);
    c.rounds = (p.M + c.thresholds - 1) / c.thresholds;
  }
  Exactly<T> rows(c.chunk * p.D), s(c.slots * p.B * c.chunk), grad(c.slots * p.B * p.D);
  c.rows = rows, c.s = s;
  if (sums_gradients(loss) && p.grad_z != nullptr) c.grad = grad;
  const Program program = make_program(loss, p.grad_z != nullptr);
  launch(cuda::composite_workspace(p.B, p.D, c), [&](const cuda::Launch& at) {
    int error = 0;
    for (; c.round < c.rounds; ++c.round)
      for (int k = 0; k < program.passes; ++k) {
        const Pass& pass = program.pass[k];
        error |= cuda::launch_composite_begin(p, pass, k, c, at);
        for (int64_t first = 0; first < c.chunks * c.chunk && p.B > 0; first += c.chunk) {
          error |= cuda::launch_composite_rows(p, c, first, at);
          multiply_transposed(p.z, rows.data.get(), p.B, c.chunk, p.D, s.data.get());
          error |= cuda::launch_composite_score(p, pass, c, first, at);
          for (int slot = 0; slot < kSlots && pass.gradient && c.grad != nullptr; ++slot)
            if (pass.slot[slot].pairs != Pairs::none)
              add_product(s.data.get() + slot * p.B * c.chunk, rows.data.get(), p.B, c.chunk, p.D,
                          grad.data.get() + slot * p.B * p.D);
        }
        error |= cuda::launch_composite_end(p, loss, k, c, at);
      }
    return error;
  });
}

// Rows of length one or so, of which one may be NaN.
template <typename T>
Exactly<T> batch(int64_t B, int64_t D) {
  Exactly<T> z = normal<T>(B * D);
  for (int64_t k = 0; k < z.size; ++k) z[k] /= static_cast<T>(std::sqrt(static_cast<double>(D)));
  if (B > 1 && up_to(3) == 0) z[D] = NAN;
  return z;
}

// The loss of a batch against itself. False: it could not be compared.
template <typename T>
bool batch_round(const Sizes& n, const LossSpec& loss) {
  const double unit = std::numeric_limits<T>::epsilon();
  const Exactly<T> z = batch<T>(n.B, n.D);
  const Exactly<int64_t> y = labels(n.B, 5);
  Exactly<T> dots(n.B * n.B);
  multiply_transposed(z.data.get(), z.data.get(), n.B, n.B, n.D, dots.data.get());
  const Exactly<double> dots64 = converted<double>(dots);
  const Exactly<int64_t> ids = labels(n.B, 9);
  const Exactly<bool> chosen = mask(n.B);
  const Exactly<double> value64(1), grad64(n.B * n.B);
  const BatchLossParams<double> p64{dots64, y,       sometimes(ids), sometimes(chosen), n.B, up_to(1) == 1,
                                    1e-6,   value64, grad64};
  batch_loss(p64, loss, kCpu);
  const double tolerance = 1000 * unit * (loss.kind == LossKind::contrastive ? 1 : 20);
  for (const double touch : {30 * unit, -30 * unit}) {  // as for the memory below
    Exactly<double> touched = copy(dots64);
    for (int64_t k = 0; k < touched.size; ++k) touched[k] += (k % 2 ? touch : -touch) * touched[k];
    const Exactly<double> value(1), grad(n.B * n.B);
    BatchLossParams<double> p = p64;
    p.dots = touched, p.loss = value, p.grad_dots = grad;
    batch_loss(p, loss, kCpu);
    if (difference(value, value64, 1) > tolerance || difference(grad, grad64) > tolerance) return false;
  }
  const Exactly<T> value(1), grad(n.B * n.B);
  std::fill(grad.data.get(), grad.data.get() + grad.size, static_cast<T>(7));
  for (T* const grad_dots : {static_cast<T*>(grad), static_cast<T*>(nullptr)}) {
    const BatchLossParams<T> p{dots, y, p64.ids, p64.anchors, n.B, p64.renormalize, 1e-6, value, grad_dots};
    launch(cuda::batch_loss_workspace<T>(n.B, loss),
           [&](const cuda::Launch& at) { return cuda::launch_batch_loss(p, loss, at); });
    close("batch_loss", difference(value, value64, 1), tolerance, n);
  }
  close("batch_loss, gradient", difference(grad, grad64, 1e-3), tolerance, n);
  return true;
}

// All other ops in a row on a memory of random fill: its rows are transformed in place, or keep a map that is pending.
// False: the loss could not be compared.
template <typename T, typename S>
bool memory_round(const Sizes& n, bool in_place, const LossSpec& loss) {
  const double unit = std::max<double>(std::numeric_limits<T>::epsilon(), std::numeric_limits<S>::epsilon());
  const double rewritten = std::max(10000 * unit, 1e-9);  // in double, what the moments differ by decides
  const Exactly<T> z = batch<T>(n.B, n.D);
  const Exactly<double> z64 = converted<double>(z);
  const Exactly<int64_t> y = labels(n.B, 5);
  const Exactly<bool> chosen = mask(n.B);
  const bool* maybe_chosen = sometimes(chosen);
  State<S> ours = State<S>::random(n);
  State<double> truth = ours.template as<double>();

  Exactly<double> mean(n.D), std(n.D), mean64(n.D), std64(n.D);
  Exactly<int64_t> rows(1), rows64(1);
  const MomentsParams<T> m{z, maybe_chosen, n.B, n.D, mean, std, rows};
  const MomentsParams<double> m64{z64, maybe_chosen, n.B, n.D, mean64, std64, rows64};
  moments(m64, kCpu);
  const auto same_moments = [&] {
    close("mean", difference(mean, mean64), 1e-11, n);
    close("std", difference(std, std64), 1e-11, n);
    require(*rows == *rows64, "rows", n.B, n.M, n.D);
  };
  launch(cuda::moments_workspace(n.B, n.D), [&](const cuda::Launch& at) { return cuda::launch_moments(m, at); });
  same_moments();
  track(track_params(m64, truth));
  launch(cuda::moments_workspace(n.B, n.D),
         [&](const cuda::Launch& at) { return cuda::launch_track(m, track_params(m, ours), at); });
  same_moments();
  same("track", ours, truth, 1e-9, n);

  if (in_place) {
    double terms = 1;  // scale * row and shift may be far larger than their sum
    for (int64_t d = 0; d < n.D; ++d) terms = std::max(terms, std::fabs(truth.shift[d]));
    transform(TransformParams<double>{truth.bank, truth.sums, truth.scale, truth.shift, truth.count, n.M, n.D}, kCpu);
    launch(cuda::rewrite_workspace(n.M, n.D), [&](const cuda::Launch& at) {
      return cuda::launch_transform(
          TransformParams<S>{ours.bank, ours.sums, ours.scale, ours.shift, ours.count, n.M, n.D}, at);
    });
    same("transform", ours, truth, std::max(100 * unit * terms, 1e-9), n);
  } else {
    standardize(
        StandardizeParams<double>{truth.bank, truth.sums, truth.scale, truth.shift, truth.count, n.M, n.D, 1e-6}, kCpu);
    launch(cuda::rewrite_workspace(n.M, n.D), [&](const cuda::Launch& at) {
      return cuda::launch_standardize(
          StandardizeParams<S>{ours.bank, ours.sums, ours.scale, ours.shift, ours.count, n.M, n.D, 1e-6}, at);
    });
    same("standardize", ours, truth, rewritten, n);
  }

  Exactly<int64_t> slots(n.B), slots64(n.B), ids = labels(n.B, 9), step(1);
  *step = 17;
  const int64_t* maybe_ids = sometimes(ids);
  enqueue(EnqueueParams<double, double>{truth.bank, truth.labels, truth.ids, truth.steps, truth.sums, truth.head,
                                        truth.count, z64, y, maybe_ids, step, maybe_chosen, truth.scale, truth.shift,
                                        slots64, n.B, n.M, n.D},
          kCpu);
  launch(cuda::enqueue_workspace(n.B), [&](const cuda::Launch& at) {
    return cuda::launch_enqueue(
        EnqueueParams<T, S>{ours.bank, ours.labels, ours.ids, ours.steps, ours.sums, ours.head, ours.count, z, y,
                            maybe_ids, step, maybe_chosen, ours.scale, ours.shift, slots, n.B, n.M, n.D},
        at);
  });
  same("enqueue", ours, truth, rewritten, n);
  require(std::equal(slots.data.get(), slots.data.get() + n.B, slots64.data.get()), "slots", n.B, n.M, n.D);

  // From here on the truth starts from the very numbers that the kernels see.
  truth = ours.template as<double>();
  MemoryLossParams<T, S> options{};
  options.anchors = sometimes(chosen);
  options.exclude = sometimes(slots);
  if (up_to(1)) options.bank_ids = ours.ids, options.exclude = ids;
  options.renormalize = up_to(1) == 1;
  options.eps = 1e-6;
  if (!in_place) options.scale = ours.scale, options.shift = ours.shift;
  MemoryLossParams<double, double> options64{};
  options64.anchors = options.anchors, options64.exclude = options.exclude, options64.bank_ids = options.bank_ids,
  options64.renormalize = options.renormalize;
  options64.eps = options.eps, options64.scale = options.scale;
  options64.shift = options.shift;
  const Exactly<double> value64(1), grad64(n.B * n.D), pairs64(2);
  const MemoryLossParams<double, double> p64 = loss_params(z64, y, truth, n, options64, value64, grad64, pairs64);
  memory_loss(p64, loss, kCpu);
  // A comparison decides whether a pair counts, or which is the hardest: where a touch of the anchors decides otherwise,
  // so may rounding.
  const double tolerance = 1000 * unit * (loss.kind == LossKind::contrastive ? 1 : 20);
  for (const double touch : {30 * unit, -30 * unit}) {  // one of them moves a pair across the line that it is close to
    Exactly<double> touched = copy(z64);
    for (int64_t k = 0; k < touched.size; ++k) touched[k] += (k % 2 ? touch : -touch) * touched[k];
    const Exactly<double> value_touched(1), grad_touched(n.B * n.D), pairs_touched(2);
    memory_loss(loss_params(touched, y, truth, n, options64, value_touched, grad_touched, pairs_touched), loss, kCpu);
    if (difference(value_touched, value64, 1) > tolerance || difference(grad_touched, grad64) > tolerance) return false;
    if (difference(pairs_touched, pairs64) > 1e-12) return false;
  }
  const auto check = [&](const char* what, const auto& run) {
    const Exactly<T> value(1), grad(n.B * n.D);
    const Exactly<double> pairs(2);
    std::fill(grad.data.get(), grad.data.get() + grad.size, static_cast<T>(7));
    run(loss_params(z, y, ours, n, options, value, grad, pairs));
    close(what, difference(value, value64, 1), tolerance, n);
    close(what, difference(grad, grad64, 1e-3), tolerance, n);
    close(what, difference(pairs, pairs64, 1), 1e-12, n);
    compared += 1;
    if (in_place || up_to(1)) return;  // the value alone once of four
    auto no_grad = loss_params(z, y, ours, n, options, value, grad, pairs);
    no_grad.grad_z = nullptr;
    run(no_grad);
    close(what, difference(value, value64, 1), tolerance, n);
  };
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, float>) {
    for (const bool tensor : {true, false})
      if (!goes_in_rounds(loss) && (!tensor || n.D % 4 == 0))  // else it would go as simt
        check(tensor ? "tensor" : "simt", [&](const auto& p) {
          launch(cuda::sweep_workspace(n.B, n.M, n.D, loss, p.grad_z != nullptr, emu::settings().multiprocessors),
                 [&](const cuda::Launch& at) { return cuda::launch_sweep(p, loss, tensor, at); });
        });
  }
  check("composite", [&](const auto& p) { composite(p, loss); });
  return true;
}

}  // namespace

// fuzz SEED ROUNDS B,M,D…: as many rounds of random shapes, then each shape in place and deferred, with a loss that goes
// by all ways and with the one that goes by the composite way only. A batch against itself where M is 1, for it depends
// on B and D only.
int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: fuzz SEED ROUNDS B,M,D...\n", stderr), 2;
  const int seed = std::atoi(argv[1]), rounds = std::atoi(argv[2]);
  generator.seed(static_cast<std::uint64_t>(seed));
  int round = seed * rounds;  // the kinds of rounds go on from seed to seed
  const auto vary = [&] {
    emu::settings().seed = static_cast<std::uint64_t>(round++);  // the very first in order of index
    emu::settings().multiprocessors = static_cast<int>(1 + up_to(5));
  };
  for (const int end = round + rounds; round < end;) {
    const int kind = round;
    vary();
    emu::settings().identities_of_warp = kind % 8 == 0 ? 32 : 2;
    Sizes n{up_to(kind % 3 == 0 ? 140 : 40), 1 + up_to(kind % 3 == 1 ? 260 : 130), 1 + up_to(kind % 3 == 2 ? 200 : 70)};
    if (kind % 8 == 7) n = {1 + up_to(6), 1 + up_to(70), 257 + up_to(767)};          // the wide kernels
    if (kind % 4 == 2) emu::settings().multiprocessors = 1, n.M = 130 + up_to(130);  // blocks of several tiles
    if (up_to(2) == 0) n.D = (n.D + 3) / 4 * 4;                                      // 16-byte accesses
    const bool in_place = up_to(1) == 1;
    const LossSpec loss = random_loss();
    memory_round<float, float>(n, in_place, loss);
    if (kind % 4 == 0) memory_round<double, double>(n, in_place, loss);
    if (kind % 4 == 1) memory_round<float, double>(n, in_place, loss);
    if (kind % 4 == 2) memory_round<double, float>(n, in_place, loss);
    batch_round<float>(n, loss);
    if (kind % 2 == 0) batch_round<double>(n, loss);
  }
  const auto vary_loss = [&](bool all_ways) {
    LossSpec loss;
    do vary(), loss = random_loss();
    while (goes_in_rounds(loss) == all_ways);
    return loss;
  };
  int shapes = 0;
  for (; shapes < argc - 3; ++shapes) {
    long long B, M, D;
    if (std::sscanf(argv[3 + shapes], "%lld,%lld,%lld", &B, &M, &D) != 3) return 2;
    emu::settings().identities_of_warp = 2;
    for (const bool all_ways : {true, false}) {
      for (const bool in_place : {true, false})
        while (!memory_round<float, float>({B, M, D}, in_place, vary_loss(all_ways)));
      while (M == 1 && !batch_round<float>({B, M, D}, vary_loss(all_ways)));
    }
  }
  std::printf("%d rounds, %d shapes, %d losses compared\n", rounds, shapes, compared);
}
