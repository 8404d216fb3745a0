// The tensor cores' product of a warp, and how float32 goes through it.
//
// They multiply in TF32: of a float they take ten of the 23 bits behind the point. A float is therefore split into two
// such numbers, x = high + low up to 2^-22 |x|, and a product is high high + high low + low high; low low is below
// 2^-22. So the digits are those of float, at three products each ("3xTF32").
#pragma once

#include <cuda_runtime.h>

namespace xbn::cuda {

// Whether code is compiled for a GPU that has this product. Elsewhere, and in what is compiled for all GPUs from 7.5
// on, the kernels that want it use ordinary arithmetic instead.
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
// c += a b, by all lanes of a warp together. Of a and b the lower 13 bits do not count. The sum is cut off, not rounded,
// so a long one should not stay in c: its error would have one sign.
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
