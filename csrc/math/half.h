// float16 and bfloat16 as storage: arithmetic is done in float. Rounds to nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "formulas.h"

namespace xbn {

XBN_FORMULA uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

XBN_FORMULA float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

class BFloat16 {
 public:
  static constexpr double kLargest = 0x1.fep127;
  BFloat16() = default;
  XBN_FORMULA explicit BFloat16(float x) {
    const uint32_t bits = bits_of(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bits_ = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  XBN_FORMULA explicit operator float() const { return float_of(static_cast<uint32_t>(bits_) << 16); }

 private:
  uint16_t bits_;
};

class Float16 {
 public:
  static constexpr double kLargest = 65504;
  Float16() = default;
#if defined(__CUDA_ARCH__)
  __device__ __forceinline__ explicit Float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits_) : "f"(x)); }
  __device__ __forceinline__ explicit operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits_));
    return x;
  }
#else
  explicit Float16(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u)
      half = 0x7e00;  // NaN
    else if (magnitude >= 0x477ff000u)
      half = 0x7c00;  // 65520 and beyond: infinity
    else if (magnitude < 0x38800000u)
      half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // subnormal: the sum rounds to multiples of 2^-24
    else
      half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    bits_ = static_cast<uint16_t>(sign | half);
  }
  explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits_ & 0x8000u) << 16, magnitude = bits_ & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
    // Shifted into place the exponent is 112 too small; multiplying by 2^112 mends it, for subnormal numbers, too.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 5.192296858534828e33f));
  }
#endif

 private:
  uint16_t bits_;
};

// What arithmetic on stored values is done in.
template <typename S>
struct Compute {
  using type = std::conditional_t<std::is_same_v<S, double>, double, float>;
};

// The largest finite number.
template <typename S>
inline constexpr double kLargestOf = S::kLargest;
template <>
inline constexpr double kLargestOf<float> = std::numeric_limits<float>::max();
template <>
inline constexpr double kLargestOf<double> = std::numeric_limits<double>::max();

// A stored value as arithmetic sees it.
template <typename T, typename S>
XBN_FORMULA T as(S stored) {
  return static_cast<T>(static_cast<typename Compute<S>::type>(stored));
}

// X(S, torch's name of S, its name in a message) for every dtype of a bank, and for those with which arithmetic can be
// in float.
#define XBN_FOR_EACH_FLOAT_BANK(X) X(float, Float, float32) X(Float16, Half, float16) X(BFloat16, BFloat16, bfloat16)
#define XBN_FOR_EACH_BANK(X) \
  X(float, Float, float32) X(double, Double, float64) X(Float16, Half, float16) X(BFloat16, BFloat16, bfloat16)

}  // namespace xbn
