// The pair losses, written once for all devices. xbn_ext/reference/losses.py states the same in PyTorch; the tests hold
// the two side by side.
//
// A loss is a Program of at most three passes over the bank. A pass fills one or two slots: a slot takes the negatives,
// the positives or all pairs of every anchor, scores each with one Formula and adds up, anchor by anchor,
//
//   sums    of what the formula says of a pair (RowSums)
//   grad    of weight * bank row, the only sum of length D
//
// What a weight is multiplied by may depend on the anchor's sums, which are known only afterwards: `finish` turns them
// into the anchor's part of the loss and one factor per slot. So one pass is enough for most losses; where a pair's
// weight itself needs a sum (NTXent's positives, mined pairs), a further pass is `given` that number for each anchor.
// DCLW's positives need a mean over all anchors: each is given the same.
//
//   loss               pass 1                               pass 2                    pass 3
//   Contrastive, Margin  negatives, positives: margin       (both in one slot where the average allows it)
//     with Euclidean distances  negatives, positives: distance
//   SigLIP             negatives, positives: sigmoid
//   SupCon             all: exponent; positives: similarity
//   NTXent             negatives: exponent                  positives: ntxent
//   DCL                negatives: exponent; positives: similarity
//   DCLW               negatives, positives: exponent       positives: weighted
//   NCA, LiftedStructure  negatives, positives: exponent
//   MultiSimilarity    negatives, positives: exponent
//     with mining      positives: extreme                   negatives: exponent       positives: exponent
//   Circle             negatives, positives: circle
//   Triplet, hardest   negatives, positives: extreme
//   Triplet, all       positives: threshold                negatives: rank           positives: weigh
//
// Distances are those of rows of unit length, d^2 = 2 - 2 s, so all are functions of s. Squared ones are linear: twice a
// loss of similarities with other margins. What an extreme is the largest or smallest d of, it is of s, too.
//
// The thresholds of an anchor are the similarities of its positives: see ranks.h. Since they are held in a fixed
// amount of memory, that program runs in rounds, each for some positives of every anchor.
#pragma once

#include "sums.h"

namespace xbn {

enum class LossKind {
  contrastive,
  supcon,
  ntxent,
  multi_similarity,
  circle,
  triplet,
  triplet_soft,
  triplet_all,
  dcl,
  dclw,
  nca,
  lifted_structure,
  siglip,
};

// What a contrastive loss is divided by: the number of anchors, of the pairs that pay, or of the positives and of the
// negatives that do, apart.
enum class Average { anchors, pairs, groups };

// What contrastive and triplet losses compare: similarities or, of rows of unit length, distances.
enum class Distance { cosine, euclidean, squared_euclidean };

// A loss and its numbers, which are:
//   contrastive, lifted_structure   a: pos_margin, b: neg_margin
//   supcon, ntxent, dcl, siglip     a: temperature; siglip b: bias
//   dclw                            a: temperature, b: sigma
//   multi_similarity                a: alpha, b: beta, c: base, and mining: its epsilon, negative for none
//   circle                          a: m, b: gamma
//   triplet                         a: margin
//   nca                             a: softmax_scale
struct LossSpec {
  LossKind kind;
  Average average = Average::anchors;
  double a = 0, b = 0, c = 0, mining = -1;
  bool euclidean = false;  // contrastive, triplet: the margins are of d = sqrt(2 - 2 s)
  double scale = 1;        // contrastive, triplet: of costs
};

// A loss whose margins are of a distance, from one with the same numbers.
inline LossSpec of_distance(LossSpec loss, Distance distance) {
  loss.euclidean = distance == Distance::euclidean;
  if (distance != Distance::squared_euclidean) return loss;
  loss.scale = 2;
  const bool of_pairs = loss.kind == LossKind::contrastive;
  loss.a = of_pairs ? 1 - loss.a / 2 : loss.a / 2;
  loss.b = of_pairs ? 1 - loss.b / 2 : loss.b;
  return loss;
}

// A loss as xbn_ext/losses/ names it, and its parameters, in the order a, b, c, mining.
struct NamedLoss {
  const char* name;
  LossKind kind;
  int parameters;
  const char* divides[2];  // the names of a and b if they must be positive, and have a reciprocal in float32
  Average average = Average::anchors;
  Distance distance = Distance::cosine;
};
constexpr NamedLoss kLosses[] = {
    {"contrastive", LossKind::contrastive, 2, {}, Average::groups},
    {"contrastive_mean", LossKind::contrastive, 2, {}},
    {"margin", LossKind::contrastive, 2, {}, Average::pairs},
    {"supcon", LossKind::supcon, 1, {"temperature"}},
    {"ntxent", LossKind::ntxent, 1, {"temperature"}},
    {"multi_similarity", LossKind::multi_similarity, 4, {"alpha", "beta"}},
    {"circle", LossKind::circle, 2, {nullptr, "gamma"}},
    {"triplet_hardest", LossKind::triplet, 1, {}},
    {"triplet_soft", LossKind::triplet_soft, 1, {}},
    {"triplet_all", LossKind::triplet_all, 1, {}},
    {"dcl", LossKind::dcl, 1, {"temperature"}},
    {"dclw", LossKind::dclw, 2, {"temperature", "sigma"}},
    {"nca", LossKind::nca, 1, {"softmax_scale"}},
    {"lifted_structure", LossKind::lifted_structure, 2, {}},
    {"siglip", LossKind::siglip, 2, {"temperature"}},
    {"contrastive_euclidean", LossKind::contrastive, 2, {}, Average::groups, Distance::euclidean},
    {"contrastive_squared_euclidean", LossKind::contrastive, 2, {}, Average::groups, Distance::squared_euclidean},
    {"contrastive_mean_euclidean", LossKind::contrastive, 2, {}, Average::anchors, Distance::euclidean},
    {"contrastive_mean_squared_euclidean", LossKind::contrastive, 2, {}, Average::anchors, Distance::squared_euclidean},
    {"triplet_hardest_euclidean", LossKind::triplet, 1, {}, Average::anchors, Distance::euclidean},
    {"triplet_hardest_squared_euclidean", LossKind::triplet, 1, {}, Average::anchors, Distance::squared_euclidean},
    {"triplet_soft_euclidean", LossKind::triplet_soft, 1, {}, Average::anchors, Distance::euclidean},
    {"triplet_soft_squared_euclidean", LossKind::triplet_soft, 1, {}, Average::anchors, Distance::squared_euclidean},
    {"triplet_all_squared_euclidean", LossKind::triplet_all, 1, {}, Average::anchors, Distance::squared_euclidean},
};

// How many slots have sums: make_program fills them all. A contrastive loss of similarities whose pairs are averaged
// together has one: its weights are 1 and -1, which tell how many are negatives.
XBN_FORMULA constexpr int slots_of(const LossSpec& loss) {
  return loss.kind == LossKind::contrastive && loss.average != Average::groups && !loss.euclidean ? 1 : 2;
}

// A loss that averages positives and negatives apart has two groups, the others one.
XBN_FORMULA int group_of(const LossSpec& loss, int slot) { return loss.average == Average::groups ? slot : 0; }

// What a loss compares, larger for more similar rows: s, or -d of a Euclidean distance d; and its derivative by s. At
// d = 0, where -d has no derivative, it is 0.
struct Nearness {
  double value, slope;
};
XBN_FORMULA Nearness nearness(const LossSpec& loss, double s) {
  if (!loss.euclidean) return {s, 1};
  const double square = 2 - 2 * s, d = square <= 0 ? 0.0 : std::sqrt(square);
  return {-d, d <= 0 ? 0 : 1 / d};
}

XBN_FORMULA RowResult finish(const LossSpec& loss, const RowSums (&sums)[kSlots]) {
  const RowSums &first = sums[0], &second = sums[1];  // of negatives or all; of positives
  RowResult r;
  r.count[0] = 1;
  switch (loss.kind) {
    case LossKind::contrastive: {
      const bool counts = loss.average != Average::anchors, apart = slots_of(loss) == 2;
      if (counts) r.count[0] = 0;
      for (int slot = 0; slot < kSlots; ++slot) {
        r.factor[slot] = loss.scale;
        for (int group = 0; group < kSlots; ++group) {  // at an index of run time they would be in a stack frame
          if (group != group_of(loss, slot)) continue;
          r.value[group] += loss.scale * sums[slot].value;
          if (counts) r.count[group] += sums[slot].pairs;
        }
      }
      // In one slot, weights are 1 for negatives and -1 for positives.
      r.positives = apart ? second.pairs : (first.pairs - first.weight) / 2;
      r.negatives = apart ? first.pairs : (first.pairs + first.weight) / 2;
      return r;
    }
    case LossKind::siglip:
      r.value[0] = first.value + second.value;
      r.factor[0] = r.factor[1] = 1 / loss.a;
      r.positives = -second.weight;  // a weight is within [0, 1]
      r.negatives = first.weight;
      return r;
    case LossKind::supcon:
      r.count[0] = 0;
      if (second.pairs == 0) return r;
      r.value[0] = log_sum(first) - second.value / second.pairs;
      r.factor[0] = 1 / first.value;
      r.factor[1] = -1 / (loss.a * second.pairs);
      if (first.pairs == 1) return r;  // an only pair costs nothing; of several each adds to the sum, however little
      r.positives = second.pairs;
      r.negatives = first.pairs - second.pairs;
      r.count[0] = 1;
      return r;
    case LossKind::ntxent:
      if (first.pairs > 0 && second.pairs > 0) r.positives = second.pairs, r.negatives = first.pairs;
      r.value[0] = second.value;
      r.count[0] = second.pairs;
      r.factor[0] = first.pairs == 0 ? 0 : second.weight / first.value;
      r.factor[1] = -1 / loss.a;
      return r;
    case LossKind::dcl:
    case LossKind::dclw:
      r.count[0] = 0;
      if (first.pairs == 0 || second.pairs == 0) return r;
      r.positives = r.count[0] = second.pairs;
      r.negatives = first.pairs;
      r.value[0] = second.pairs * log_sum(first) - second.value / (loss.kind == LossKind::dclw ? loss.a : 1);
      r.factor[0] = second.pairs / first.value;
      r.factor[1] = -1 / loss.a;
      return r;
    case LossKind::nca: {
      r.count[0] = 0;
      if (second.pairs == 0) return r;
      if (first.pairs > 0) r.positives = second.pairs, r.negatives = first.pairs;
      r.count[0] = 1;
      const double x = log_sum(first) - log_sum(second);  // without negatives -inf, or a NaN that the positives have
      r.value[0] = softplus(x);
      r.factor[0] = first.pairs == 0 ? 0 : sigmoid(x) / first.value;
      r.factor[1] = -sigmoid(x) / second.value;
      return r;
    }
    case LossKind::lifted_structure: {
      const double push = first.pairs == 0 ? 0 : log_sum(first) - loss.b;
      const double pull = second.pairs == 0 ? 0 : log_sum(second) + loss.a;
      if (push + pull <= 0) return r;
      r.positives = second.pairs;
      r.negatives = first.pairs;
      r.value[0] = push + pull;
      r.factor[0] = first.pairs == 0 ? 0 : 1 / first.value;
      r.factor[1] = second.pairs == 0 ? 0 : 1 / second.value;
      return r;
    }
    case LossKind::multi_similarity: {
      const double push = log_sum(first) - loss.b * loss.c, pull = log_sum(second) + loss.a * loss.c;
      r.positives = second.pairs;
      r.negatives = first.pairs;
      r.value[0] = softplus(push) / loss.b + softplus(pull) / loss.a;
      r.factor[0] = first.pairs == 0 ? 0 : sigmoid(push) / (loss.b * first.value);
      r.factor[1] = second.pairs == 0 ? 0 : sigmoid(pull) / (loss.a * second.value);
      return r;
    }
    case LossKind::circle: {
      r.count[0] = 0;
      if (first.pairs == 0 || second.pairs == 0) return r;
      r.positives = second.pairs;
      r.negatives = first.pairs;
      const double x = log_sum(first) + log_sum(second);
      r.value[0] = softplus(x);
      r.factor[0] = sigmoid(x) / first.value;
      r.factor[1] = sigmoid(x) / second.value;
      r.count[0] = 1;
      return r;
    }
    case LossKind::triplet:
    case LossKind::triplet_soft: {
      r.count[0] = 0;
      if (first.pairs == 0 || second.pairs == 0) return r;
      const Nearness negative = nearness(loss, first.shift), positive = nearness(loss, -second.shift);
      const double cost = loss.scale * (negative.value - positive.value + loss.a);
      const bool soft = loss.kind == LossKind::triplet_soft;
      if (cost <= 0 && !soft) return r;
      r.value[0] = soft ? softplus(cost) : cost;
      r.count[0] = r.positives = r.negatives = 1;
      if (first.value < 0 || second.value < 0) return r;  // an infinite similarity is no row's
      const double weight = loss.scale * (soft ? sigmoid(cost) : 1);
      r.factor[0] = weight * negative.slope;
      r.factor[1] = -weight * positive.slope;
      return r;
    }
    case LossKind::triplet_all:
      r.value[0] = loss.scale * first.value;
      r.count[0] = first.pairs;
      r.factor[0] = loss.scale;
      r.factor[1] = -loss.scale;
      r.positives = second.weight;
      r.negatives = first.weight;
      return r;
  }
  return r;
}

// Whether the second pass is given a mean over all anchors, each the same.
XBN_FORMULA constexpr bool gives_in_common(const LossSpec& loss) { return loss.kind == LossKind::dclw; }

// What an anchor adds to the sum in common: the positives of one that has negatives, too, and is finite.
XBN_FORMULA RowSums part_in_common(const RowSums (&sums)[kSlots]) {
  const bool adds = sums[0].pairs > 0 && 0 * sums[1].value == 0;
  return adds ? sums[1] : no_sums(Formula::exponent);
}

// What all are given, from that sum: the log of the mean of e^x.
XBN_FORMULA double mean_in_common(const RowSums& sum) {
  return sum.pairs == 0 ? 0.0 : log_sum(sum) - std::log(sum.pairs);
}

// The sum in common, in the place of totals [7].
XBN_FORMULA void store_in_common(const RowSums& sum, double* totals) {
  totals[0] = log_sum(sum), totals[2] = sum.pairs;
}

// It, over anchors [0, B) by sums_of(i), the sums of each so far; nothing, of a loss that gives none.
template <typename SumsOf>
RowSums sum_in_common(const LossSpec& loss, int64_t B, const SumsOf& sums_of) {
  RowSums sum = no_sums(Formula::exponent);
  for (int64_t i = 0; gives_in_common(loss) && i < B; ++i)
    sum = add(Formula::exponent, sum, part_in_common(sums_of(i).of));
  return sum;
}

// What an anchor is given for pass `next` of the program, from its sums so far and what all are given in common.
XBN_FORMULA double given_for(const LossSpec& loss, int next, const RowSums (&sums)[kSlots], double common) {
  switch (loss.kind) {
    case LossKind::ntxent: return log_sum(sums[0]);
    case LossKind::dclw: return common;
    case LossKind::triplet_all: return 0;  // it has its thresholds
    case LossKind::multi_similarity:
      if (next == 1) return -sums[1].shift - loss.mining;  // negatives above the hardest positive, nearly
      return sums[0].shift / loss.b + loss.mining;         // positives below the hardest negative, nearly
    default: return NAN;                                   // no other loss has a second pass
  }
}

// Whether gradients are sums at all: those of extremes are gathered from two rows.
inline bool sums_gradients(const LossSpec& loss) {
  return loss.kind != LossKind::triplet && loss.kind != LossKind::triplet_soft;
}

// Whether the program runs in rounds.
inline bool goes_in_rounds(const LossSpec& loss) { return loss.kind == LossKind::triplet_all; }

// Without a gradient, the passes that add nothing to the value are left out.
constexpr Program make_program(const LossSpec& loss, bool need_grad = true) {
  const auto margin = [&](Pairs pairs) {
    return Slot{pairs, loss.euclidean ? Formula::distance : Formula::margin, loss.a, loss.b};
  };
  const auto circle = [&](Pairs pairs) { return Slot{pairs, Formula::circle, loss.a, loss.b}; };
  const auto extreme = [&](Pairs pairs) { return Slot{pairs, Formula::extreme, 0, 0, false, true}; };
  constexpr Pairs negatives = Pairs::negatives, positives = Pairs::positives, all = Pairs::all;
  const Slot none = {};
  switch (loss.kind) {
    case LossKind::contrastive:
      if (slots_of(loss) == 1) return {1, {{{margin(all), none}}}};
      return {1, {{{margin(negatives), margin(positives)}}}};
    case LossKind::supcon:
      return {1, {{{{all, Formula::exponent, 1 / loss.a}, {positives, Formula::similarity, 1 / loss.a}}}}};
    case LossKind::ntxent:
      return {
          2,
          {{{{negatives, Formula::exponent, 1 / loss.a}, none}}, {{none, {positives, Formula::ntxent, 1 / loss.a}}}}};
    case LossKind::siglip:
      return {
          1,
          {{{{negatives, Formula::sigmoid, 1 / loss.a, loss.b}, {positives, Formula::sigmoid, 1 / loss.a, loss.b}}}}};
    case LossKind::dcl:
      return {1, {{{{negatives, Formula::exponent, 1 / loss.a}, {positives, Formula::similarity, 1 / loss.a}}}}};
    case LossKind::dclw:
      return {
          2,
          {{{{negatives, Formula::exponent, 1 / loss.a}, {positives, Formula::exponent, 1 / loss.b, 0, false, true}}},
           {{none, {positives, Formula::weighted, 1 / loss.b}}}}};
    case LossKind::nca:
      return {1, {{{{negatives, Formula::exponent, loss.a}, {positives, Formula::exponent, loss.a}}}}};
    case LossKind::lifted_structure:
      return {1, {{{{negatives, Formula::exponent, 1}, {positives, Formula::exponent, -1}}}}};
    case LossKind::multi_similarity: {
      const bool mined = loss.mining >= 0;
      const Slot push = {negatives, Formula::exponent, loss.b, 0, mined};
      const Slot pull = {positives, Formula::exponent, -loss.a, 0, mined};
      if (!mined) return {1, {{{push, pull}}}};
      return {3, {{{none, extreme(positives)}}, {{push, none}}, {{none, pull}}}};
    }
    case LossKind::circle: return {1, {{{circle(negatives), circle(positives)}}}};
    case LossKind::triplet:
    case LossKind::triplet_soft: return {1, {{{extreme(negatives), extreme(positives)}}}};
    case LossKind::triplet_all:
      return {need_grad ? 3 : 2,
              {{{none, {positives, Formula::threshold, 0, 0, false, true}}},
               {{{negatives, Formula::rank, loss.a}, none}},
               {{none, {positives, Formula::weigh}}}}};
  }
  return {};
}

// The similarity up to which a negative costs nothing, whatever float32 rounds on the way from it to the cost.
inline double limit_of_negatives(const Slot& slot) {
  if (slot.formula != Formula::distance) return slot.b;
  if (slot.b <= 0) return 1e30;  // none costs anything
  const double limit = 1 - slot.b * slot.b / 2 * (1 + 1e-6);
  return limit - 1e-7 * (1 + std::fabs(limit));
}

}  // namespace xbn
