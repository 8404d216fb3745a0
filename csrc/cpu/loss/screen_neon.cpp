// Products of bytes on aarch64: by the dot products of ARMv8.2. With g++ on Linux only: clang 14 takes the intrinsics for
// a whole file or not at all, and elsewhere there is another way to ask the processor.
#include "screen.h"

#if defined(__aarch64__) && defined(__linux__) && !defined(__clang__)

#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <algorithm>

#define XBN_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define XBN_UNROLL _Pragma("GCC unroll 8")

namespace xbn {
namespace {

void encode_neon(const float* rows, int64_t n, int64_t padded, const float* per_unit, uint8_t* codes) {
  const float32x4_t rounds = vdupq_n_f32(0x1.8p23F);  // added, leaves a number below 2^22 rounded in the low bits
  for (int64_t j = 0; j < n; ++j) {
    const float32x4_t scale = vdupq_n_f32(per_unit[j]);
    for (int64_t d = 0; d < padded; d += 16) {
      const float* x = rows + j * padded + d;
      uint16x4_t code[4];
      XBN_UNROLL
      for (int k = 0; k < 4; ++k)
        code[k] = vmovn_u32(vreinterpretq_u32_f32(vfmaq_f32(rounds, vld1q_f32(x + 4 * k), scale)));
      const uint8x8_t low = vmovn_u16(vcombine_u16(code[0], code[1])), high = vmovn_u16(vcombine_u16(code[2], code[3]));
      vst1q_u8(codes + j * padded + d, vcombine_u8(low, high));
    }
  }
}

// A bit for each of four anchors from the i'th on whose sums with a row are above a limit: one of the row, or one of each.
uint64_t above(const CodeLimits& limits, int32x4_t sum, int64_t row, int64_t i) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  uint32x4_t is;
  if (limits.of_row != nullptr) {
    is = vcgtq_s32(sum, vdupq_n_s32(limits.of_row[row]));
  } else {
    const float32x4_t limit =
        vfmaq_f32(vdupq_n_f32(-limits.offset), vld1q_f32(limits.slope + i), vdupq_n_f32(limits.per_step[row]));
    is = vmvnq_u32(vcleq_f32(vcvtq_f32_s32(sum), limit));  // above a NaN, too
  }
  return vaddvq_u32(vandq_u32(is, vld1q_u32(kBits)));
}

constexpr int kRows = kTileUnit, kFours = 4;  // 24 sums, 6 rows and an anchor's codes of 32 registers

// sum += the products of one four of bytes of the rows and of 16 anchors.
template <int four>
XBN_DOT inline void add_products(int32x4_t (&sum)[kRows][kFours], const int8x16_t (&u)[kRows], const int8_t* anchors) {
  XBN_UNROLL
  for (int c = 0; c < kFours; ++c) {
    const int8x16_t z = vld1q_s8(anchors + four * 4 * kAnchorBlock + 16 * c);
    XBN_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r][c] = vdotq_laneq_s32(sum[r][c], z, u[r], four);
  }
}

XBN_DOT void find_neon(const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors, const int32_t* start,
                       const CodeLimits& limits, Prefetch& prefetch, uint64_t* found) {
  Prefetch ahead = prefetch;
  for (int64_t j = 0; j < n; j += kRows) {
    std::fill_n(found + j, kRows, uint64_t{0});
    for (int64_t i = 0; i < kAnchorBlock; i += 4 * kFours) {
      int32x4_t sum[kRows][kFours];
      XBN_UNROLL
      for (int c = 0; c < kFours; ++c) {
        XBN_UNROLL
        for (int r = 0; r < kRows; ++r) sum[r][c] = vld1q_s32(start + i + 4 * c);
      }
      for (int64_t d = 0; d < padded; d += 16) {
        ahead.step();
        ahead.step();
        int8x16_t u[kRows];
        XBN_UNROLL
        for (int r = 0; r < kRows; ++r) u[r] = vreinterpretq_s8_u8(vld1q_u8(rows + (j + r) * padded + d));
        const int8_t* z = anchors + d * kAnchorBlock + 4 * i;
        add_products<0>(sum, u, z);
        add_products<1>(sum, u, z);
        add_products<2>(sum, u, z);
        add_products<3>(sum, u, z);
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kFours; ++c) found[j + r] |= above(limits, sum[r][c], j + r, i + 4 * c) << (i + 4 * c);
    }
  }
  prefetch = ahead;
}

constexpr ByteProducts kNeon = {127, 127, 0, encode_neon, find_neon};

}  // namespace

const ByteProducts* byte_products(Isa) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? &kNeon : nullptr; }

}  // namespace xbn

#elif defined(__aarch64__)

namespace xbn {
const ByteProducts* byte_products(Isa) { return nullptr; }
}  // namespace xbn

#endif
