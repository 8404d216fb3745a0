// The tensor cores' products of a warp, in fp16 and in TF32, and how float32 products are made from either.
//
// In TF32 they read ten of a float's 23 fraction bits. A float is therefore split into two such numbers,
// x = high + low up to 2^-22 |x|, and a product is high high + high low + low high; low low is below 2^-22. So the
// digits are those of float, at three products each ("3xTF32").
//
// fp16 has as many fraction bits, at twice the speed, but few exponents: x = high + low up to 2^-22 |x| where |x| is in
// [2^-3, 65504], and up to 2^-25 below, where `low` has fixed steps. So numbers are scaled by powers of two before.
#pragma once

#include <cuda_runtime.h>

namespace xbn::cuda {

// Whether code is compiled for a GPU that has this product. Elsewhere, and in what is compiled for all GPUs from 7.5
// on, the kernels that want it do nothing, and are not launched.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kHasTensorCores = true;
#else
constexpr bool kHasTensorCores = false;
#endif

// Which elements a lane has, with g = lane / 4 and t = lane % 4:
//   a [16 x 8]  (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b [8 x 8]   (t, g), (t + 4, g)
//   c [16 x 8]  (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
//
// c += a b, by all lanes of a warp together. The lower 13 bits of a and b do not count. The sum is cut off, not
// rounded, so a long one should not stay in c: its error would have one sign.
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#elif !defined(__CUDACC__)
  mma_m16n8k8_tf32(c, a, b);
#endif
}

// Two floats as fp16 to nearest, `low` in the lower 16 bits.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#elif !defined(__CUDACC__)
  return cvt_rn_f16x2_f32(high, low);
#else
  return 0;
#endif
}

// c += a b in fp16, c in float and cut off as above; two columns k, k + 1 in 32 bits, the first in the lower 16:
//   a [16 x 16]  x (g, 2 t), y (g + 8, 2 t), z (g, 2 t + 8), w (g + 8, 2 t + 8)
//   b [16 x 8]   (2 t, g), (2 t + 8, g)
//   c [16 x 8]   as above
__device__ __forceinline__ void multiply_add_f16(float (&c)[4], const uint4& a, const uint2& b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#elif !defined(__CUDACC__)
  mma_m16n8k16_f16(c, a, b);
#endif
}

__device__ __forceinline__ float2 unpack_f16(uint32_t both) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float2 x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(both));
  return x;
#elif !defined(__CUDACC__)
  return make_float2(cvt_f32_f16(both & 0xffffu), cvt_f32_f16(both >> 16));
#else
  return {};
#endif
}

// Two floats as their two fp16 parts, packed.
struct Halves {
  uint32_t high, low;

  __device__ __forceinline__ Halves(float x, float y) {
    high = pack_f16(x, y);
    const float2 rounded = unpack_f16(high);
    low = pack_f16(x - rounded.x, y - rounded.y);
  }
};

// c += a b to the digits of float, from the parts, the small ones first.
__device__ __forceinline__ void multiply_add_halves(float (&c)[4], const uint4& high_a, const uint4& low_a,
                                                    const uint2& high_b, const uint2& low_b) {
  multiply_add_f16(c, low_a, high_b);
  multiply_add_f16(c, high_a, low_b);
  multiply_add_f16(c, high_a, high_b);
}

// A power of two, and its reciprocal, that brings numbers up to `largest` to below 2^15, or nowhere near it if they are
// zeros, subnormal or not finite.
struct PowerOfTwo {
  float times, back;

  __device__ __forceinline__ explicit PowerOfTwo(float largest) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 0xffu), wanted = 2 * 127 + 14 - exponent;
    const unsigned bits = static_cast<unsigned>(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted);
    times = __uint_as_float(bits << 23);
    back = __uint_as_float((254 - bits) << 23);
  }
};

// Floats as their two TF32 parts.
template <int kCount>
struct Split {
  float high[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);  // to nearest
    low[i] = x - high[i];
  }
};

// c += a b to the digits of float, the small parts first.
__device__ __forceinline__ void multiply_add(float (&c)[4], const Split<4>& a, const Split<2>& b) {
  multiply_add_tf32(c, a.low, b.high);
  multiply_add_tf32(c, a.high, b.low);
  multiply_add_tf32(c, a.high, b.high);
}

}  // namespace xbn::cuda
