// Products of bytes on x86-64: with AVX512_VNNI and AVX_VNNI of 8 bits, with AVX2 of 7, so that the sum of four fits in
// 16 bits.
#include "screen.h"

#if defined(XBN_X86_ISAS)

#if defined(__GNUC__) && !defined(__clang__)
// Of the intrinsics' own code, which starts from undefined registers: GCC bug 105593.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define XBN_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define XBN_AVX2 __attribute__((target("avx2,fma")))
#define XBN_UNROLL _Pragma("GCC unroll 8")

namespace xbn {
namespace {

// Added to a number below 2^22, leaves it rounded in the low bits.
constexpr float kRounds = 0x1.8p23F;

int32_t four_bytes(const uint8_t* bytes) {
  int32_t four;
  __builtin_memcpy(&four, bytes, sizeof four);
  return four;
}

XBN_VNNI void encode_vnni(const float* rows, int64_t n, int64_t padded, const float* per_unit, uint8_t* codes) {
  const __m512 zero = _mm512_set1_ps(kRounds + 128);
  for (int64_t j = 0; j < n; ++j) {
    const __m512 scale = _mm512_set1_ps(per_unit[j]);
    for (int64_t d = 0; d < padded; d += 16) {
      const __m512 code = _mm512_fmadd_ps(_mm512_loadu_ps(rows + j * padded + d), scale, zero);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j * padded + d),
                       _mm512_cvtepi32_epi8(_mm512_castps_si512(code)));
    }
  }
}

// Whether the sums of a row and of 16 or 8 anchors from the i'th on are above a limit: one of the row, or one of each.
struct OneLimit {
  const CodeLimits& limits;

  XBN_VNNI uint64_t above(__m512i sum, int64_t row, int64_t) const {
    return _mm512_cmpgt_epi32_mask(sum, _mm512_set1_epi32(limits.of_row[row]));
  }
  XBN_AVX2 uint64_t above(__m256i sum, int64_t row, int64_t) const {
    const __m256i is = _mm256_cmpgt_epi32(sum, _mm256_set1_epi32(limits.of_row[row]));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is)));
  }
};

struct EachLimit {
  const CodeLimits& limits;

  XBN_VNNI uint64_t above(__m512i sum, int64_t row, int64_t i) const {
    const __m512 limit = _mm512_fmsub_ps(_mm512_loadu_ps(limits.slope + i), _mm512_set1_ps(limits.per_step[row]),
                                         _mm512_set1_ps(limits.offset));
    return _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(sum), limit, _CMP_NLE_UQ);
  }
  XBN_AVX2 uint64_t above(__m256i sum, int64_t row, int64_t i) const {
    const __m256 limit = _mm256_fmsub_ps(_mm256_loadu_ps(limits.slope + i), _mm256_set1_ps(limits.per_step[row]),
                                         _mm256_set1_ps(limits.offset));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_cvtepi32_ps(sum), limit, _CMP_NLE_UQ)));
  }
};

template <typename Limit>
XBN_VNNI void find_512(const Limit& limit, const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors,
                       const int32_t* start, Prefetch& prefetch, uint64_t* found) {
  constexpr int R = kTileUnit, C = kAnchorBlock / 16;
  Prefetch ahead = prefetch;  // a copy, which stays in registers
  for (int64_t j = 0; j < n; j += R) {
    __m512i sum[R][C];
    XBN_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512i first = _mm512_load_si512(start + c * 16);
      XBN_UNROLL
      for (int r = 0; r < R; ++r) sum[r][c] = first;
    }
    for (int64_t d = 0; d < padded; d += 4) {
      ahead.step();
      ahead.step();
      __m512i z[C];
      XBN_UNROLL
      for (int c = 0; c < C; ++c) z[c] = _mm512_load_si512(anchors + d * kAnchorBlock + c * 64);
      XBN_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i u = _mm512_set1_epi32(four_bytes(rows + (j + r) * padded + d));
        // By asm, for gcc 12 keeps copies of all sums on the stack with the intrinsic.
        XBN_UNROLL
        for (int c = 0; c < C; ++c) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(u), "v"(z[c]));
      }
    }
    XBN_UNROLL
    for (int r = 0; r < R; ++r) {
      uint64_t above = 0;
      XBN_UNROLL
      for (int c = 0; c < C; ++c) above |= limit.above(sum[r][c], j + r, 16 * c) << (16 * c);
      found[j + r] = above;
    }
  }
  prefetch = ahead;
}

XBN_VNNI void find_vnni(const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors, const int32_t* start,
                        const CodeLimits& limits, Prefetch& prefetch, uint64_t* found) {
  if (limits.of_row != nullptr)
    find_512(OneLimit{limits}, rows, n, padded, anchors, start, prefetch, found);
  else
    find_512(EachLimit{limits}, rows, n, padded, anchors, start, prefetch, found);
}

// zero: what stands for 0
template <int zero>
XBN_AVX2 void encode_avx2(const float* rows, int64_t n, int64_t padded, const float* per_unit, uint8_t* codes) {
  const __m256i low_byte = _mm256_set1_epi32(0xff), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t j = 0; j < n; ++j) {
    const __m256 scale = _mm256_set1_ps(per_unit[j]);
    for (int64_t d = 0; d < padded; d += 16) {
      const float* x = rows + j * padded + d;
      __m256i code[2];
      XBN_UNROLL
      for (int k = 0; k < 2; ++k)
        code[k] = _mm256_and_si256(
            _mm256_castps_si256(_mm256_fmadd_ps(_mm256_loadu_ps(x + 8 * k), scale, _mm256_set1_ps(kRounds + zero))),
            low_byte);
      // Halves of 128 bits are packed each by itself: fours of bytes 0, 2, 0, 2, 1, 3, 1, 3.
      const __m256i shorts = _mm256_packus_epi32(code[0], code[1]);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(shorts, shorts), order);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + j * padded + d), _mm256_castsi256_si128(bytes));
    }
  }
}

// Products of kFours fours of bytes of a row and of eight anchors, added to the anchors' sums.
struct SevenBits {
  static constexpr int kFours = 2,
                       kRows = kTileUnit / 2;  // 6 sums, 4 anchors, 2 rows, 2 products and `ones`: 15 registers
  __m256i ones;

  // Each of a and b takes two instructions to make 16-bit sums of two products, which together still fit. By asm, for gcc
  // 12 spills with the intrinsics.
  XBN_AVX2 void add(__m256i& sum, const __m256i* u, const __m256i* z) const {
    __m256i a, b;
    asm("vpmaddubsw %5, %3, %1\n\t"
        "vpmaddubsw %6, %4, %2\n\t"
        "vpaddw %2, %1, %1\n\t"
        "vpmaddwd %7, %1, %1\n\t"
        "vpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(a), "=&x"(b)
        : "x"(u[0]), "x"(u[1]), "x"(z[0]), "x"(z[1]), "x"(ones));
  }
};

// Assemblers have known this form of the instruction since about the time of gcc 12.
#if defined(__clang__) || __GNUC__ >= 12
struct EightBits {
  static constexpr int kFours = 1, kRows = kTileUnit;  // 12 sums, 2 anchors and a row

  XBN_AVX2 void add(__m256i& sum, const __m256i* u, const __m256i* z) const {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u[0]), "x"(z[0]));
  }
};

#endif

template <typename Products, typename Limit>
XBN_AVX2 void find_256(const Products& products, const Limit& limit, const uint8_t* rows, int64_t n, int64_t padded,
                       const int8_t* anchors, const int32_t* start, Prefetch& prefetch, uint64_t* found) {
  constexpr int R = Products::kRows, F = Products::kFours, C = 2;
  Prefetch ahead = prefetch;
  for (int64_t j = 0; j < n; j += R) {
    uint64_t above[R] = {};
    for (int64_t i = 0; i < kAnchorBlock; i += 8 * C) {
      __m256i sum[R][C];
      XBN_UNROLL
      for (int c = 0; c < C; ++c) {
        const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(start + i + 8 * c));
        XBN_UNROLL
        for (int r = 0; r < R; ++r) sum[r][c] = first;
      }
      for (int64_t d = 0; d < padded; d += 4 * F) {
        ahead.step();
        __m256i z[C][F];
        XBN_UNROLL
        for (int f = 0; f < F; ++f) {
          const int8_t* from = anchors + (d + 4 * f) * kAnchorBlock + 4 * i;
          XBN_UNROLL
          for (int c = 0; c < C; ++c) z[c][f] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 32 * c));
        }
        XBN_UNROLL
        for (int r = 0; r < R; ++r) {
          __m256i u[F];
          XBN_UNROLL
          for (int f = 0; f < F; ++f) u[f] = _mm256_set1_epi32(four_bytes(rows + (j + r) * padded + d + 4 * f));
          XBN_UNROLL
          for (int c = 0; c < C; ++c) products.add(sum[r][c], u, z[c]);
        }
      }
      XBN_UNROLL
      for (int r = 0; r < R; ++r) {
        XBN_UNROLL
        for (int c = 0; c < C; ++c) above[r] |= limit.above(sum[r][c], j + r, i + 8 * c) << (i + 8 * c);
      }
    }
    std::copy_n(above, R, found + j);
  }
  prefetch = ahead;
}

template <typename Products>
XBN_AVX2 void find_256(const Products& products, const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors,
                       const int32_t* start, const CodeLimits& limits, Prefetch& prefetch, uint64_t* found) {
  if (limits.of_row != nullptr)
    find_256(products, OneLimit{limits}, rows, n, padded, anchors, start, prefetch, found);
  else
    find_256(products, EachLimit{limits}, rows, n, padded, anchors, start, prefetch, found);
}

XBN_AVX2 void find_avx2(const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors, const int32_t* start,
                        const CodeLimits& limits, Prefetch& prefetch, uint64_t* found) {
  find_256(SevenBits{_mm256_set1_epi16(1)}, rows, n, padded, anchors, start, limits, prefetch, found);
}

#if defined(__clang__) || __GNUC__ >= 12
XBN_AVX2 void find_avx_vnni(const uint8_t* rows, int64_t n, int64_t padded, const int8_t* anchors, const int32_t* start,
                            const CodeLimits& limits, Prefetch& prefetch, uint64_t* found) {
  find_256(EightBits{}, rows, n, padded, anchors, start, limits, prefetch, found);
}

constexpr ByteProducts kAvxVnni = {127, 127, 128, encode_avx2<128>, find_avx_vnni};
#else
constexpr ByteProducts kAvxVnni = {63, 64, 64, encode_avx2<64>, find_avx2};
#endif

constexpr ByteProducts kAvx512Vnni = {127, 127, 128, encode_vnni, find_vnni};
constexpr ByteProducts kAvx2 = {63, 64, 64, encode_avx2<64>, find_avx2};

}  // namespace

const ByteProducts* byte_products(Isa isa) {
  switch (isa) {
    case Isa::avx512_vnni: return &kAvx512Vnni;
    case Isa::avx_vnni: return &kAvxVnni;
    case Isa::avx512:
    case Isa::avx2: return &kAvx2;
    case Isa::baseline: break;
  }
  return nullptr;
}

}  // namespace xbn

#endif
