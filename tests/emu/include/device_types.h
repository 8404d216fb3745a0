// Types and built-in variables of CUDA C++.
#pragma once

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Copied in accesses of eight bytes, not float by float: fewer for a sanitizer to look at.
__attribute__((always_inline)) inline void emu_copy_two(float* to, const float* from) {
  using Two [[gnu::may_alias]] = unsigned long;
  unsigned long two = *reinterpret_cast<const Two*>(from);
  asm("" : "+r"(two));  // or the compiler makes two accesses of it
  *reinterpret_cast<Two*>(to) = two;
}

struct alignas(8) float2 {
  float x, y;
  float2() = default;
  constexpr float2(float x_, float y_) : x(x_), y(y_) {}
  __attribute__((always_inline)) float2(const float2& from) { emu_copy_two(&x, &from.x); }
  __attribute__((always_inline)) float2& operator=(const float2& from) {
    emu_copy_two(&x, &from.x);
    return *this;
  }
};
struct alignas(16) float4 {
  float x, y, z, w;
  float4() = default;
  constexpr float4(float x_, float y_, float z_, float w_) : x(x_), y(y_), z(z_), w(w_) {}
  __attribute__((always_inline)) float4(const float4& from) { *this = from; }
  __attribute__((always_inline)) float4& operator=(const float4& from) {
    emu_copy_two(&x, &from.x);
    emu_copy_two(&z, &from.z);
    return *this;
  }
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int warpSize = 32;

// The executor sets them whenever it goes over to another CUDA thread. Plain variables, so that reading one is a single
// load; kernels must not write them.
inline __attribute__((visibility("hidden"))) uint3 threadIdx{}, blockIdx{};
inline __attribute__((visibility("hidden"))) dim3 blockDim, gridDim;
