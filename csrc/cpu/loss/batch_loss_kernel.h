// Compiled once per instruction set: see for_each_isa.h. What the pairs of some anchors with their batch cost and
// weigh.

#include "../../math/pair_formulas.h"
#include "vectors_kernel.h"

#include "score_kernel.h"
#include "triplets_kernel.h"

// Anchors [first, first + count) side by side, filled up to kBatchAnchors, and all rows, a tile at a time.
template <typename T>
struct BatchUnit {
  static constexpr int64_t U = kBatchAnchors;

  const BatchLossParams<T>& p;
  const LossSpec& loss;
  const Batch<T>& batch;
  const int64_t first;
  const double common = 0;  // what all anchors are given
  const int64_t B = p.B, count = std::min(U, p.A - first), tiles = ceil_div(B, kScoredRows);
  const std::vector<char> mixed = batch.mixed(first, count);  // [B]

  // Of each slot, as it was scored last:
  Slot slots[kSlots] = {};
  RowSums sums[kSlots][U] = {};
  Scratch<T> weights{kSlots * B * U};     // [kSlots][B][U]
  Scratch<T> shifts{kSlots * tiles * U};  // [kSlots][tiles][U] to which those of a tile are scaled, as exponentials are

  T given[U] = {};
  T nan[U] = {};  // of an anchor that is not finite; else 0
  alignas(kVectorBytes) T tile[kScoredRows * U];
  std::optional<Triplets<T, U>> triplets;
  CountsAbove<T, U> above{batch.thresholds > 0};
  std::vector<int32_t> list;

  int64_t rows_from(int64_t begin) const { return std::min(kScoredRows, B - begin); }
  T* shifts_of(int slot, int64_t begin) const { return shifts.data() + (slot * tiles + begin / kScoredRows) * U; }

  Scorer<T, U> scorer(int slot, int64_t begin) {
    return {.rows = {.size = rows_from(begin),
                     .number = batch.number.data() + begin,
                     .label = batch.labels.label.data() + begin,
                     .excluded = batch.labels.excluded.data() + begin,
                     .mixed = mixed.data() + begin},
            .slot = slots[slot],
            .label = batch.anchor_label.data() + first,
            .excluded = batch.anchor_excluded.data() + first,
            .given = given,
            .s = tile,
            .weight = weights.data() + (slot * B + begin) * U,
            .sums = sums[slot]};
  }

  void begin() {
    for (int64_t i = 0; i < count; ++i)
      if (!batch.is_finite(first + i)) nan[i] = std::numeric_limits<T>::quiet_NaN();
    if (count < U) std::fill_n(tile, kScoredRows * U, T(0));
  }

  SlotSums sums_of(int64_t i) const { return {{sums[0][i], sums[1][i]}}; }

  // All passes; then the anchors' results [count].
  void rank(RowResult* results) {
    begin();
    const bool extremes = !sums_gradients(loss);
    if (extremes || goes_in_rounds(loss))
      std::fill_n(weights.data(), kSlots * B * U, T(0));  // not all rows are weighed
    if (goes_in_rounds(loss)) triplets.emplace(U, batch.thresholds, batch.thresholds);
    const Program program = make_program(loss, p.grad_dots != nullptr);
    for (int k = 0; k < program.passes; ++k) {
      score(program.pass[k]);
      for (int64_t i = 0; i < U; ++i) {
        if (program.pass[k].slot[1].formula == Formula::threshold) triplets->sort(i);
        if (program.pass[k].slot[0].formula == Formula::rank) triplets->settle(i, sums[0][i], sums[1][i]);
        const SlotSums so_far = sums_of(i);
        if (k + 1 < program.passes) given[i] = static_cast<T>(given_for(loss, k + 1, so_far.of, common));
        if (i < count) results[i] = finish(loss, so_far.of);
      }
    }
    for (int64_t i = 0; extremes && i < count; ++i)
      for (int slot = 0; slot < kSlots; ++slot)
        if (const double row = sums[slot][i].value; row >= 0)
          weights.data()[(slot * B + static_cast<int64_t>(row)) * U + i] = T(1);
  }

  void score(const Pass& pass) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (pass.slot[slot].pairs == Pairs::none) continue;
      slots[slot] = pass.slot[slot];
      if (slots[slot].formula != Formula::weigh)  // that goes on with its thresholds'
        std::fill_n(sums[slot], U, no_sums(slots[slot].formula));
    }
    for (int64_t begin = 0; begin < B; begin += kScoredRows) {
      load_tile(begin);
      for (int slot = 0; slot < kSlots; ++slot) {
        if (pass.slot[slot].pairs == Pairs::none) continue;
        Scorer<T, U> of_tile = scorer(slot, begin);
        if (triplets)
          TripletScorer<T, U>{of_tile, *triplets, 0, above.of(0), list}.add();
        else
          of_tile.add(nullptr, 0);
        for (int64_t i = 0; i < U; ++i) shifts_of(slot, begin)[i] = static_cast<T>(sums[slot][i].shift);
        list.clear();
      }
    }
    if (pass.slot[0].formula == Formula::rank) above.add_to(*triplets, 0, 0, sums[0]);
  }

  // The similarities of the rows from `begin` on.
  void load_tile(int64_t begin) {
    transpose(p.dots + first * B + begin, B, count, rows_from(begin), tile, U);
    const T* const inverse_norm = batch.inverse_norm.data() + begin;
    for (int64_t j = 0, rows = rows_from(begin); j < rows; ++j)
      for (int64_t i = 0; i < U; i += kLanes<T>) {
        T* const s = tile + j * U + i;
        store_lanes(s, load_lanes(s) * inverse_norm[j] + load_lanes(nan + i));
      }
  }

  // dL/ds into grad_dots, up to what sums are multiplied by in the end.
  void write_gradient(const RowResult* results) {
    for (int64_t begin = 0; begin < B; begin += kScoredRows) {
      for (int slot = 0; slot < slots_of(loss); ++slot) add_weights(slot, begin, results);
      transpose(tile, U, rows_from(begin), count, p.grad_dots + first * B + begin, B);
    }
    for (int64_t i = 0; i < count; ++i)
      if (nan[i] != T(0) || !batch.ranks(first + i)) std::fill_n(p.grad_dots + (first + i) * B, B, nan[i]);
  }

  // To the tile those of a slot, times its factors. If a similarity is NaN, so is the factor.
  void add_weights(int slot, int64_t begin, const RowResult* results) {
    const Scorer<T, U> of_tile = scorer(slot, begin);
    const bool scaled = is_exponential(slots[slot].formula);
    for (int64_t first_lane = 0; first_lane < U; first_lane += kLanes<T>) {
      T factors[kLanes<T>] = {};
      for (int64_t i = first_lane; i < std::min<int64_t>(first_lane + kLanes<T>, count); ++i)
        factors[i - first_lane] = static_cast<T>(
            results[i].factor[slot] * (scaled ? rescale(shifts_of(slot, begin)[i], sums[slot][i].shift) : 1.0));
      const Lanes<T> zero = {}, factor = load_lanes(factors);
      of_tile.each_row(first_lane, [&](int64_t j, const auto& mask) {
        const int64_t at = j * U + first_lane;
        const Lanes<T> grad = factor * load_lanes(of_tile.weight + at);
        // The first slot takes negatives or all pairs, and so looks at every row.
        store_lanes(tile + at, (slot == 0 ? zero : load_lanes(tile + at)) + (mask.on ? grad : zero));
      });
    }
  }
};

// The sums of the first pass of anchors from `first` on.
template <typename T>
void look_at_anchors(const BatchLossParams<T>& p, const LossSpec& loss, const Batch<T>& batch, int64_t first,
                     SlotSums* sums) {
  BatchUnit<T> unit{.p = p, .loss = loss, .batch = batch, .first = first};
  unit.begin();
  unit.score(make_program(loss).pass[0]);
  for (int64_t i = 0; i < unit.count; ++i) sums[first + i] = unit.sums_of(i);
}

// Anchors from `first` on: their results, and the derivative of those by their similarities.
template <typename T>
void rank_anchors(const BatchLossParams<T>& p, const LossSpec& loss, const Batch<T>& batch, double common,
                  int64_t first, RowResult* results) {
  BatchUnit<T> unit{.p = p, .loss = loss, .batch = batch, .first = first, .common = common};
  unit.rank(results + first);
  if (p.grad_dots != nullptr) unit.write_gradient(results + first);
}

// grad_dots of the anchors from `first` on, from the derivatives by their similarities. sums [B]: of g dots.
template <typename T>
void settle_anchors(const BatchLossParams<T>& p, const Batch<T>& batch, T of_negatives, T of_positives, int64_t first,
                    T* sums) {
  const T* inverse_norm = batch.inverse_norm.data();
  const int32_t* label = batch.labels.label.data();
  std::fill_n(sums, p.B, T(0));
  for (int64_t i = first; i < std::min(first + kBatchAnchors, p.B); ++i) {
    const T* dots = p.dots + i * p.B;
    T* grad = p.grad_dots + i * p.B;
#pragma omp simd
    for (int64_t j = 0; j < p.B; ++j) {
      grad[j] *= (label[j] == label[i] ? of_positives : of_negatives) * inverse_norm[j];
      sums[j] += grad[j] * dots[j];
    }
  }
}

// dL/ddots_jj of the rows from `first` on. sums [units][B]: of settle_anchors.
template <typename T>
void settle_norms(const BatchLossParams<T>& p, const Batch<T>& batch, const T* sums, int64_t first) {
  T sum[kBatchAnchors] = {};
  const int64_t end = std::min(first + kBatchAnchors, p.B);
  for (int64_t unit = 0; unit < ceil_div(p.B, kBatchAnchors); ++unit)
    for (int64_t j = first; j < end; ++j) sum[j - first] += sums[unit * p.B + j];
  for (int64_t j = first; j < end; ++j) {
    const T inverse = batch.inverse_norm[j];
    if (!(batch.norm[j] < static_cast<T>(p.eps)))
      p.grad_dots[j * p.B + j] = sum[j - first] * inverse * (T(-0.5) * inverse);  // a factor at a time, or it overflows
  }
}
