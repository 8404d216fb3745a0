// Four floats at a time, or four stored values as floats.
#pragma once

#include "device.cuh"

namespace xbn::cuda {

__device__ __forceinline__ float4 zeros4() { return make_float4(0, 0, 0, 0); }

// Of stored values that are next to each other, the k-th four.
template <typename S, int kWidth>
__device__ __forceinline__ float4 four_of(const Vector<S, kWidth>& u, int k) {
  return make_float4(as<float>(u.value[4 * k]), as<float>(u.value[4 * k + 1]), as<float>(u.value[4 * k + 2]),
                     as<float>(u.value[4 * k + 3]));
}

// By one access. To nvcc a struct's copy may be one for each of its parts, if it stands under a condition.
template <typename S>
__device__ __forceinline__ Vector<S, 4> stored_four_at(const S* values) {
  Vector<S, 4> u;
#ifdef __CUDA_ARCH__
  const auto word = *reinterpret_cast<const std::conditional_t<sizeof(S) == 4, uint4, uint2>*>(values);
  memcpy(&u, &word, sizeof(u));
#else
  u = *reinterpret_cast<const Vector<S, 4>*>(values);
#endif
  return u;
}
template <typename S>
__device__ __forceinline__ float4 four_at(const S* values) {
  return four_of(stored_four_at(values), 0);
}

// By one access, for the same reason by an intrinsic.
__device__ __forceinline__ void store4(float* values, float4 x) {
#ifdef __CUDA_ARCH__
  __stwb(reinterpret_cast<float4*>(values), x);
#else
  *reinterpret_cast<float4*>(values) = x;
#endif
}

// scale * u + shift, where those of u's columns begin at k.
__device__ __forceinline__ float4 affine4(const float* scale, const float* shift, int k, float4 u) {
  const float4 a = *reinterpret_cast<const float4*>(scale + k), b = *reinterpret_cast<const float4*>(shift + k);
  return make_float4(fmaf(a.x, u.x, b.x), fmaf(a.y, u.y, b.y), fmaf(a.z, u.z, b.z), fmaf(a.w, u.w, b.w));
}

// sum + a . b
__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// sum + factor * a
__device__ __forceinline__ float4 add4(float factor, float4 a, float4 sum) {
  return make_float4(fmaf(factor, a.x, sum.x), fmaf(factor, a.y, sum.y), fmaf(factor, a.z, sum.z),
                     fmaf(factor, a.w, sum.w));
}

}  // namespace xbn::cuda
