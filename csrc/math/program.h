// What a loss is made of: a Program of passes over the bank, and in each the slots that it fills. losses.h has those of
// every loss, pair_formulas.h what a slot's Formula says of a pair.
#pragma once

#include <cstring>
#include <type_traits>

#include "formulas.h"

namespace xbn {

enum class Pairs { none, negatives, positives, all };
enum class Formula;  // pair_formulas.h

struct Slot {
  Pairs pairs;
  Formula formula;
  double a, b;
  bool mined;      // exponent: only negatives above, positives below what the anchor is given
  bool only_sums;  // it adds up no weight * row
};

constexpr int kSlots = 2;

struct Pass {
  Slot slot[kSlots];

  // Whether it fills a slot that adds up a gradient.
  XBN_FORMULA bool weighs(int k) const { return slot[k].pairs != Pairs::none && !slot[k].only_sums; }
  bool weighs() const { return weighs(0) || weighs(1); }
};

struct Program {
  int passes;
  Pass pass[3];
};

// What the slots hold when the first passes of a program are done.
struct Filled {
  Formula formula[kSlots];
  bool some[kSlots];

  static Filled after(const Program& program, int passes) {
    Filled filled = {};
    for (int k = 0; k < passes; ++k)
      for (int slot = 0; slot < kSlots; ++slot) {
        if (program.pass[k].slot[slot].pairs == Pairs::none) continue;
        filled.some[slot] = true;
        filled.formula[slot] = program.pass[k].slot[slot].formula;
      }
    return filled;
  }
};

#include "pair_formulas.h"

}  // namespace xbn
