// What is added up: of an anchor, over the pairs of a slot and over the parts of a bank; of the loss, over the anchors.
#pragma once

#include "program.h"

namespace xbn {

// An anchor's sums over the pairs of a slot.
struct RowSums {
  double value;   // of the values; of e^(x - shift); of an extreme, its bank row, or -1
  double weight;  // of the weights; exponents have none
  double pairs;   // how many counted
  double shift;   // of exponents, the largest x; of an extreme, it: the largest s, or the largest -s of positives
};

struct SlotSums {
  RowSums of[kSlots] = {};
};

// Sums before the first pair.
XBN_FORMULA RowSums no_sums(Formula formula) {
  const bool extreme = formula == Formula::extreme;
  return {extreme ? -1.0 : 0.0, 0.0, 0.0, extreme || is_exponential(formula) ? -INFINITY : 0.0};
}

// What sums scaled by e^-shift are multiplied by to be scaled by e^-to; no pairs, no matter.
XBN_FORMULA double rescale(double shift, double to) { return shift == to ? 1.0 : std::exp(shift - to); }

// Of a slot of exponents, the log of the sum of e^x.
XBN_FORMULA double log_sum(const RowSums& sums) {
  return sums.pairs == 0 ? -INFINITY : std::log(sums.value) + sums.shift;
}

// Adds up the sums of two parts of the bank.
XBN_FORMULA RowSums add(Formula formula, const RowSums& left, const RowSums& right) {
  const double pairs = left.pairs + right.pairs;
  if (formula == Formula::extreme) {
    const bool sooner = right.shift == left.shift && right.value < left.value;  // of equals the first row
    const bool second = right.value >= 0 && (exceeds(right.shift, left.shift) || sooner);
    return {second ? right.value : left.value, 0, pairs, second ? right.shift : left.shift};
  }
  if (is_exponential(formula)) {
    const double shift = right.shift > left.shift ? right.shift : left.shift;
    const double value = left.value * rescale(left.shift, shift) + right.value * rescale(right.shift, shift);
    return {value, 0, pairs, shift};
  }
  return {left.value + right.value, left.weight + right.weight, pairs, 0};
}

// An anchor's sums over n parts of the bank, those of part k at parts[k * stride], added in their order.
XBN_FORMULA RowSums sum_of_parts(Formula formula, const RowSums* parts, int64_t n, int64_t stride) {
  RowSums sum = no_sums(formula);
  for (int64_t k = 0; k < n; ++k) sum = add(formula, sum, parts[k * stride]);
  return sum;
}

// What the gradient of a part is multiplied by, when the sums of all parts are known. It is the same factor for all
// parts, except where a part has scaled its exponents by its own largest one, and where only the part with the extreme
// counts.
XBN_FORMULA double scale_of_part(Formula formula, double factor, const RowSums& part, const RowSums& sum) {
  if (formula == Formula::extreme) return part.value == sum.value ? factor : 0;
  return is_exponential(formula) ? factor * rescale(part.shift, sum.shift) : factor;
}

// An anchor's part of the loss. The loss is sum(value) / sum(count) over the anchors, group by group; a slot's gradient
// is multiplied by factor / sum(count of its group).
struct RowResult {
  double value[kSlots] = {0, 0};
  double count[kSlots] = {0, 0};
  double factor[kSlots] = {0, 0};
  double positives = 0, negatives = 0;  // that have a weight
};

// The loss, from the parts of the anchors that rank.
struct LossSum {
  double value[kSlots] = {0, 0}, count[kSlots] = {0, 0};
  double anchors = 0, positives = 0, negatives = 0;

  XBN_FORMULA void add(const RowResult& anchor) {
    for (int group = 0; group < kSlots; ++group)
      value[group] += anchor.value[group], count[group] += anchor.count[group];
    anchors += 1, positives += anchor.positives, negatives += anchor.negatives;
  }

  // What sums are multiplied by.
  XBN_FORMULA double average(int group) const { return 1 / (count[group] > 1 ? count[group] : 1.0); }
  XBN_FORMULA double loss() const {
    double sum = 0;
    for (int group = 0; group < kSlots; ++group) sum += average(group) * value[group];
    return sum;
  }

  XBN_FORMULA void store(double* totals) const {
    for (int group = 0; group < kSlots; ++group) totals[group] = value[group], totals[kSlots + group] = count[group];
    totals[4] = anchors, totals[5] = positives, totals[6] = negatives;
  }

  // Positives and negatives of an anchor that have a weight, on average.
  XBN_FORMULA void store_pairs(double* pairs) const {
    pairs[0] = positives / (anchors > 1 ? anchors : 1.0);
    pairs[1] = negatives / (anchors > 1 ? anchors : 1.0);
  }
};

}  // namespace xbn
