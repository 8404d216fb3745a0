// Finds with eight-bit products the bank rows that cannot have an active pair with a block of anchors, so that their
// exact similarities are not needed. For losses in which a negative counts only above a margin: most are far below it.
//
//   codes   x = step q + rest: q whole numbers in [-127, 127], step = max |x| / 127
//   bound   z . r = step_z step_r (q_z . q_r) + error,  |error| <= |z| |rest_r| + |rest_z| (|r| + |rest_r|),  |r| <= 1
//   out     is a row that is at most the margin from every anchor by that, and by what float32 may round. It would have
//           added zeros: the loss has the same bits with and without the screen.
//   rate    one multiply-add of bytes does what four of floats do
//
// Needs AVX512_VNNI, and bank rows that are normalised as they are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "../../math/losses.h"
#include "prefetch.h"
#include "sweep.h"

namespace xbn {

constexpr int64_t kLeastScreenedDim = 64;       // below, little is left to save
constexpr int64_t kMostScreenedDim = 32 << 10;  // sums of products of bytes fit in 32 bits

// A block of anchors.
struct CodedAnchors {
  explicit CodedAnchors(int64_t D) : fours(ceil_div(D, 4)), codes(fours * 4 * kAnchorBlock) {}

  // z [D][64], finite.
  void encode(const float* z, int64_t D);

  const int64_t fours;
  Scratch<uint8_t> codes;  // [fours][64][4], each plus 128
  alignas(64) float step[kAnchorBlock];
  alignas(64) float norm[kAnchorBlock];
  alignas(64) float rest[kAnchorBlock];
};

// The rows of a tile.
class CodedTile {
 public:
  CodedTile(int64_t capacity, int64_t padded)
      : padded_(padded), codes_(round_up(capacity, kTileUnit) * padded), rows_(round_up(capacity, kTileUnit)) {}

  // A unit of rows [6][padded], which are the tile's from the j'th on.
  void encode(const float* rows, const float* inverse_norm, int64_t j);

  // Whether no row of the unit from the j'th on has a similarity above the margin. Makes 2 anchors.fours steps of a
  // prefetch.
  bool is_below(float margin, const CodedAnchors& anchors, int64_t j, Prefetch& prefetch) const;

 private:
  // Of a row, times its inverse norm.
  struct Row {
    int32_t offset;  // -128 sum of the codes
    float step;      // NaN: not to be told
    float rest;
  };

  int64_t padded_;
  Scratch<int8_t> codes_;  // [rows][padded]
  Scratch<Row> rows_;
};

// What the units of a sweep share.
struct Screen {
  static bool helps(const Cpu& cpu, const LossSpec& loss, int64_t D, bool renormalize) {
    return cpu.isa == Isa::avx512_vnni && loss.kind == LossKind::contrastive && renormalize && D >= kLeastScreenedDim &&
           D <= kMostScreenedDim;
  }

  Screen(float margin_, int64_t blocks, int64_t D) : margin(margin_), dim(D), usable(blocks) {
    for (int64_t block = 0; block < blocks; ++block) anchors.emplace_back(D);
  }

  // The anchors of a block, once they are packed.
  void encode(int64_t block, const Sweep<float>& sweep) {
    const auto finite = sweep.finite.begin() + block * kAnchorBlock;
    usable[block] = std::all_of(finite, finite + kAnchorBlock, [](char is) { return is != 0; });
    if (usable[block]) anchors[block].encode(sweep.anchors(block), dim);
  }

  const float margin;
  const int64_t dim;
  std::deque<CodedAnchors> anchors;  // by block
  std::vector<char> usable;          // by block: whether all anchors are finite
};

}  // namespace xbn
