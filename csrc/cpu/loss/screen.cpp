#include "screen.h"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// Of the intrinsics' own code, which starts from undefined registers: GCC bug 105593.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define XBN_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#endif

namespace xbn {

#if defined(__x86_64__)

namespace {

constexpr float kLargestCode = 127;
constexpr float kNotToBeTold = std::numeric_limits<float>::quiet_NaN();  // is not below any margin

// 1 / step; or 0 where that might overflow, and all is rest.
float codes_per_unit(float largest) { return largest > 1e-30F ? kLargestCode / largest : 0; }

}  // namespace

XBN_VNNI void CodedAnchors::encode(const float* z, int64_t D) {
  constexpr float kRounds = 0x1.8p23F;  // added and taken away, leaves a whole number
  float largest[kAnchorBlock] = {}, per_unit[kAnchorBlock], square[kAnchorBlock] = {}, rest_square[kAnchorBlock] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int64_t i = 0; i < kAnchorBlock; ++i) largest[i] = std::max(largest[i], std::fabs(z[d * kAnchorBlock + i]));
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    per_unit[i] = codes_per_unit(largest[i]);
    step[i] = largest[i] / kLargestCode;
  }
  std::fill_n(codes.data(), fours * 4 * kAnchorBlock, uint8_t{128});
  for (int64_t d = 0; d < D; ++d) {
    uint8_t* const to = codes.data() + d / 4 * 4 * kAnchorBlock + d % 4;
    for (int64_t i = 0; i < kAnchorBlock; ++i) {
      const float x = z[d * kAnchorBlock + i], q = x * per_unit[i] + kRounds - kRounds, left = x - step[i] * q;
      square[i] += x * x;
      rest_square[i] += left * left;
      to[i * 4] = static_cast<uint8_t>(static_cast<int>(q) + 128);
    }
  }
  for (int64_t i = 0; i < kAnchorBlock; ++i) {
    const bool squares_underflow = largest[i] > 0 && largest[i] < 1e-12F;  // even of the rest, and flushed to zero
    norm[i] = squares_underflow ? kNotToBeTold : std::sqrt(square[i]);
    rest[i] = std::sqrt(rest_square[i]);
  }
}

XBN_VNNI void CodedTile::encode(const float* rows, const float* inverse_norm, int64_t j) {
  // Beyond, a row is so short that its squares may underflow, or so long that they, or products with it, may overflow.
  constexpr float kLeastInverse = 1e-15F, kMostInverse = 1e9F;
  constexpr int R = kTileUnit;
  int8_t* const codes = codes_.data() + j * padded_;
  __m512 largest[R] = {}, rest_square[R] = {}, per_unit[R];
  __m512i sum[R] = {};
  float step[R];
  for (int64_t d = 0; d < padded_; d += 16) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      largest[r] = _mm512_max_ps(largest[r], _mm512_abs_ps(_mm512_loadu_ps(rows + r * padded_ + d)));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float top = _mm512_reduce_max_ps(largest[r]);
    step[r] = top / kLargestCode;
    per_unit[r] = _mm512_set1_ps(codes_per_unit(top));
  }
  for (int64_t d = 0; d < padded_; d += 16) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * padded_ + d;
      const __m512 x = _mm512_loadu_ps(rows + at);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, per_unit[r]));
      const __m512 left = _mm512_fnmadd_ps(_mm512_set1_ps(step[r]), _mm512_cvtepi32_ps(q), x);
      rest_square[r] = _mm512_fmadd_ps(left, left, rest_square[r]);
      sum[r] = _mm512_add_epi32(sum[r], q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + at), _mm512_cvtsepi32_epi8(q));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float inverse = inverse_norm[r];
    // Unsigned: of a row that is not finite, whose rest is not, either, the sum of codes may overflow.
    const auto codes_sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum[r]));
    rows_.data()[j + r] = {static_cast<int32_t>(-128 * codes_sum),
                           kLeastInverse < inverse && inverse < kMostInverse ? step[r] * inverse : kNotToBeTold,
                           std::sqrt(_mm512_reduce_add_ps(rest_square[r])) * inverse};
  }
}

XBN_VNNI bool CodedTile::is_below(float margin, const CodedAnchors& anchors, int64_t j, Prefetch& prefetch) const {
  constexpr int R = kTileUnit, C = kAnchorBlock / 16;
  const int8_t* u = codes_.data() + j * padded_;
  const Row* row = rows_.data() + j;
  __m512i sum[R][C] = {};  // multiplied by asm, for gcc 12 keeps copies of all of it on the stack with the intrinsic
  const int64_t fours = anchors.fours;
  Prefetch next = prefetch;  // a copy, which stays in registers
  for (int64_t d = 0; d < fours; ++d) {
    next.step();
    next.step();
    __m512i z[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) z[c] = _mm512_load_si512(anchors.codes.data() + (d * kAnchorBlock + c * 16) * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, u + r * padded_ + d * 4, sizeof four);
      const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(z[c]), "v"(q));
    }
  }
  prefetch = next;
  // What float32 may round, here and in the similarity itself: about 2 parts in 2^24 of |z| for each dimension. Twice
  // that.
  const float rounding = static_cast<float>(padded_ + 8) * 0x1p-22F;
  const __m512 margins = _mm512_set1_ps(margin);
  __mmask16 below = 0xffff;
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const __m512 step = _mm512_load_ps(anchors.step + c * 16), norm = _mm512_load_ps(anchors.norm + c * 16);
    const __m512 rest = _mm512_load_ps(anchors.rest + c * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Row& k = row[r];
      const __m512i dot = _mm512_add_epi32(sum[r][c], _mm512_set1_epi32(k.offset));
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(k.step));
      __m512 most = _mm512_mul_ps(norm, _mm512_set1_ps(k.rest + rounding));
      most = _mm512_fmadd_ps(rest, _mm512_set1_ps(1 + k.rest), most);
      most = _mm512_fmadd_ps(product, step, most);
      below &= _mm512_cmp_ps_mask(most, margins, _CMP_LE_OQ);
    }
  }
  return below == 0xffff;
}

#else

void CodedAnchors::encode(const float*, int64_t) {}
void CodedTile::encode(const float*, const float*, int64_t) {}
bool CodedTile::is_below(float, const CodedAnchors&, int64_t, Prefetch&) const { return false; }

#endif

}  // namespace xbn
