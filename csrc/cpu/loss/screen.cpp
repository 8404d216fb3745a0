#include "screen.h"

#include <algorithm>
#include <cmath>

namespace xbn {

CodedAnchors::CodedAnchors(const float* z, int64_t B, int64_t D, const Sweep<float>& sweep, int64_t block,
                           const ByteProducts& products)
    : padded_(sweep.plan.padded_dim),
      anchors_(kAnchorBlock * padded_),
      codes_(kAnchorBlock * padded_),
      with_label_(sweep.labels.distinct_labels.size()),
      with_id_(sweep.labels.ids.size()) {
  constexpr double kLongest = 1e18, kRounds = 0x1.8p52;  // the latter added and taken away leaves a whole number
  const int64_t first = block * kAnchorBlock, rows = std::min(kAnchorBlock, B - first);
  z += first * D;
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < rows * D; ++k) largest = std::max(largest, std::fabs(z[k]));
  step_ = static_cast<double>(largest) / products.anchor_code;
  const double step = step_, per_unit = step > 0 ? 1 / step : 0;
  double norm = 0, rest = 0;  // the largest of all anchors
  const Scratch<int8_t> row(padded_);
  std::fill_n(anchors_.data(), kAnchorBlock * padded_, 0.0F);
  std::fill_n(codes_.data(), kAnchorBlock * padded_, int8_t{0});
  std::fill_n(start_, kAnchorBlock, 0);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(z + i * D, D, anchors_.data() + i * padded_);
    const float* anchor = anchors_.data() + i * padded_;
    double square = 0, rest_square = 0, sum = 0;
#pragma omp simd reduction(+ : square, rest_square, sum)
    for (int64_t d = 0; d < padded_; ++d) {
      const double x = anchor[d], code = x * per_unit + kRounds - kRounds, left = x - step * code;
      row.data()[d] = static_cast<int8_t>(code);
      sum += code;
      square += x * x;
      rest_square += left * left;
    }
    for (int64_t d = 0; d < padded_; d += 4) std::copy_n(row.data() + d, 4, codes_.data() + (d * kAnchorBlock + 4 * i));
    norm = std::max(norm, std::sqrt(square));
    rest = std::max(rest, std::sqrt(rest_square));
    start_[i] = static_cast<int32_t>(-products.row_zero * sum);
    const uint64_t bit = uint64_t{1} << i;
    const int32_t label = sweep.labels.label[first + i], id = sweep.labels.excluded[first + i];
    all_ |= bit;
    with_label_[label] |= bit;
    if (id != kNoneExcluded) with_id_[id] |= bit;
  }
  // What float32 may round, here and in the similarity itself: about 2 parts in 2^24 of |z| for each dimension. Twice
  // that. And what it may flush to zero.
  const double rounding = static_cast<double>(padded_ + 8) * 0x1p-22, flushed = 1e-24;
  const double rest_of_row = 0.5001 * std::sqrt(static_cast<double>(padded_));  // in steps
  usable_ = norm < kLongest;
  unsure_ = norm * rounding + rest + flushed;
  offset_ = (norm + rest) * rest_of_row / step;
}

#if !defined(XBN_X86_ISAS) && !defined(__aarch64__)
const ByteProducts* byte_products(Isa) { return nullptr; }
#endif

}  // namespace xbn
