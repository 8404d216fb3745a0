// Finds with products of bytes the pairs of bank rows and anchors that may count, so that only their exact similarities
// are needed. For losses in which a negative counts only above a margin, above what an anchor's positives leave, or above
// the hardest negative so far: most are far below it.
//
//   codes   x = step q + rest, q whole numbers: of the rows of a bank, step = max |x| / row_code, each row its own; of a
//           block of anchors all the same, step = max |x| / anchor_code. So |rest| <= step sqrt(D) / 2
//   bound   z . r = step_z step_r (q_z . q_r) + error,  |error| <= |z| |rest_r| + |rest_z| (|r| + |rest_r|),  |r| <= 1
//   out     is a pair whose similarity is at most the margin by that, and by what float32 may round. So is q_z . q_r at
//           most a whole number, which is the same for all pairs of a row and a block if the margin is. It would have
//           added zeros: the loss has the same bits with and without the screen.
//   rate    one multiply-add of bytes does what four of floats do with AVX512_VNNI or on aarch64, and nearly three with AVX2
//
// Needs bank rows that are normalised as they are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../../math/losses.h"
#include "prefetch.h"
#include "sweep.h"

namespace xbn {

constexpr int64_t kLeastScreenedDim = 64;       // below, little is left to save
constexpr int64_t kMostScreenedDim = 32 << 10;  // sums of products of bytes fit in 32 bits

// What products of codes are compared with, for n rows and a block of anchors: a pair is out if it is at most that of its
// row; or, if these are null, at most slope * per_step - offset.
struct CodeLimits {
  const int32_t* of_row;  // [n]
  const float* slope;     // [64]
  const float* per_step;  // [n]
  float offset;
};

// How a processor multiplies bytes: of rows, from 1 on, by those of anchors, which have a sign.
struct ByteProducts {
  int row_code, anchor_code;  // the largest
  int row_zero;               // what stands for 0

  // codes [n][padded] of rows [n][padded], times per_unit [n]
  void (*encode)(const float* rows, int64_t n, int64_t padded, const float* per_unit, uint8_t* codes);

  // For each of n rows, a multiple of kTileUnit, a bit for each of the anchors [padded / 4][64][4] whose product with
  // it, plus start, is not out. Makes screen_steps of a prefetch, or twice as many.
  void (*find)(const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors, const int32_t* start,
               const CodeLimits& limits, Prefetch& prefetch, uint64_t* found);
};

// The best that an instruction set has, or null if it has none.
const ByteProducts* byte_products(Isa isa);

inline int64_t screen_steps(int64_t n, int64_t padded) { return padded / 2 * ceil_div(n, kTileUnit); }

// A block of anchors.
class CodedAnchors {
 public:
  // Of z [B][D], all finite in this block.
  CodedAnchors(const float* z, int64_t B, int64_t D, const Sweep<float>& sweep, int64_t block,
               const ByteProducts& products);

  // Whether pairs can be out at all: not of anchors so long that products with them might overflow.
  bool is_usable() const { return usable_; }

  const float* anchor(int64_t i) const { return anchors_.data() + i * padded_; }
  const int8_t* codes() const { return codes_.data(); }
  const int32_t* start() const { return start_; }

  // A pair is out if the product of its codes, plus `start`, is at most slope / step - offset, step being that of the row,
  // as it counts.
  double slope(double margin) const { return (margin - unsure_) / step_; }
  double offset() const { return offset_; }

  // A bit for each anchor: that is one; that is a positive of a row with this label; that is not paired with one of this
  // id. Labels and ids are indices as AnchorLabels has them, or kNoAnchor.
  uint64_t all() const { return all_; }
  uint64_t positives(int32_t label) const { return label == kNoAnchor ? 0 : with_label_[label]; }
  uint64_t excluded(int32_t id) const { return id == kNoAnchor ? 0 : with_id_[id]; }

 private:
  int64_t padded_;
  Scratch<float> anchors_;  // [64][padded]
  Scratch<int8_t> codes_;   // [padded / 4][64][4]
  alignas(64) int32_t start_[kAnchorBlock];
  bool usable_;
  double step_, unsure_, offset_;
  uint64_t all_ = 0;
  std::vector<uint64_t> with_label_;  // [distinct labels]
  std::vector<uint64_t> with_id_;     // [ids]
};

// Whether a pass may be left to single pairs. Their similarities are sums of kPairChains. It has positives alone, or
// negatives that count only above a limit, which limit (pairs_kernel.h) finds; for margins that is the first pass's.
inline bool may_be_screened(const Pass& pass) {
  const Slot& slot = pass.slot[0];
  if (slot.pairs == Pairs::none) {
    const Formula of_positives = pass.slot[1].formula;
    return !is_exponential(of_positives) || of_positives == Formula::exponent;
  }
  const bool has_limit = slot.formula == Formula::margin || slot.formula == Formula::distance ||
                         slot.formula == Formula::extreme || slot.formula == Formula::rank;
  return has_limit || (slot.formula == Formula::exponent && slot.mined);
}

// What the units of a sweep share.
struct Screen {
  // The products to screen with, or null if a sweep is better off without.
  static const ByteProducts* products_for(const Cpu& cpu, const LossSpec& loss, int64_t D, bool renormalize) {
    const Program program = make_program(loss);
    const bool any = std::any_of(program.pass, program.pass + program.passes, may_be_screened);
    const bool can = any && renormalize && cpu.screening != Screening::never;
    return can && D >= kLeastScreenedDim && D <= kMostScreenedDim ? byte_products(cpu.isa) : nullptr;
  }

  Screen(const ByteProducts& products, double margin, bool always, int64_t blocks)
      : products(products), margin(static_cast<float>(margin)), always(always), anchors(blocks) {}

  // The anchors of a block of z [B][D], once they are packed.
  void encode(const float* z, int64_t B, int64_t D, const Sweep<float>& sweep, int64_t block) {
    const auto finite = sweep.finite.begin() + block * kAnchorBlock;
    if (!std::all_of(finite, finite + kAnchorBlock, [](char is) { return is != 0; })) return;
    anchors[block] = std::make_unique<CodedAnchors>(z, B, D, sweep, block, products);
  }

  const ByteProducts& products;
  const double margin;
  const bool always;                                   // however many pairs it finds
  std::vector<std::unique_ptr<CodedAnchors>> anchors;  // by block; null if any of them is not finite
};

}  // namespace xbn
