// Device functions of CUDA C++. Barriers and warp intrinsics take a last argument that CUDA's do not have: the place of
// the call, by default.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "executor.h"

inline void __syncthreads(emu::Place place = emu::Place::current()) { emu::executor.meet_block(false, place); }
inline int __syncthreads_count(int predicate, emu::Place place = emu::Place::current()) {
  return static_cast<int>(emu::executor.meet_block(predicate != 0, place));
}
inline int __syncthreads_or(int predicate, emu::Place place = emu::Place::current()) {
  return emu::executor.meet_block(predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, emu::Place place = emu::Place::current()) {
  return emu::executor.meet_block(predicate == 0, place) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, emu::Place place = emu::Place::current()) {
  emu::executor.meet_warp(emu::WarpOp::kSync, mask, 0, 0, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Place place = emu::Place::current()) {
  return static_cast<unsigned>(emu::executor.meet_warp(emu::WarpOp::kBallot, mask, predicate != 0, 0, place));
}
inline int __any_sync(unsigned mask, int predicate, emu::Place place = emu::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Place place = emu::Place::current()) {
  return __ballot_sync(mask, predicate == 0, place) == 0;
}

namespace [[gnu::visibility("hidden")]] emu {

// Lane `source` of the warp, if it is in the calling lane's group of `width` lanes, else the calling lane itself.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
  static_assert(std::is_trivially_destructible_v<T> && sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t offer = 0;
  std::memcpy(&offer, static_cast<const void*>(&value), sizeof(T));
  const std::uint64_t answer = executor.meet_warp(WarpOp::kShuffle, mask, offer, source, place);
  std::memcpy(static_cast<void*>(&value), &answer, sizeof(T));
  return value;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, emu::Place place = emu::Place::current()) {
  const int lane = static_cast<int>(emu::executor.lane()), group = lane & ~(width - 1);
  return emu::shuffle(mask, value, group | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emu::Place place = emu::Place::current()) {
  const int lane = static_cast<int>(emu::executor.lane()), source = lane ^ lane_mask, last = lane | (width - 1);
  return emu::shuffle(mask, value, source > last ? lane : source, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emu::Place place = emu::Place::current()) {
  const unsigned lane = emu::executor.lane(), source = lane + delta, last = lane | (width - 1);
  return emu::shuffle(mask, value, source > last ? lane : source, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emu::Place place = emu::Place::current()) {
  const int lane = static_cast<int>(emu::executor.lane()), source = lane - static_cast<int>(delta);
  return emu::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, place);
}

// For mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32, which is inline PTX.
inline void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                             emu::Place place = emu::Place::current()) {
  emu::executor.multiply(c, a, b, place);
}

// For mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32, for cvt.rn.f16x2.f32, whose first operand is the upper half,
// and for cvt.f32.f16.
inline void mma_m16n8k16_f16(float (&c)[4], const uint4& a, const uint2& b, emu::Place place = emu::Place::current()) {
  emu::executor.multiply(c, {a.x, a.y, a.z, a.w}, {b.x, b.y}, place);
}
inline unsigned cvt_rn_f16x2_f32(float high, float low) {
  const auto bits = [](float x) { return unsigned{__builtin_bit_cast(unsigned short, static_cast<_Float16>(x))}; };
  return bits(high) << 16 | bits(low);
}
inline float cvt_f32_f16(unsigned x) {
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<unsigned short>(x)));
}

inline void __threadfence() {
  if constexpr (emu::kRaceDetection) emu::executor.fence();
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
inline void __threadfence_block() {
  if constexpr (emu::kRaceDetection) emu::executor.fence_block();
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

namespace [[gnu::visibility("hidden")]] emu {

// Replaces *address by next(*address) and returns what was there. Relaxed, as in CUDA: it orders no other memory.
template <class T, class Next>
T update_atomically(T* address, Next next) {
  if constexpr (kRaceDetection) executor.note_atomic();
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, next(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emu

inline int atomicAdd(int* address, int value) {
  return emu::update_atomically(address, [=](int old) {
    return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps round
  });
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emu::update_atomically(address, [=](unsigned old) { return old + value; });
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return emu::update_atomically(address, [=](unsigned long long old) { return old + value; });
}
inline float atomicAdd(float* address, float value) {
  return emu::update_atomically(address, [=](float old) { return old + value; });
}
inline double atomicAdd(double* address, double value) {
  return emu::update_atomically(address, [=](double old) { return old + value; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emu::update_atomically(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline int atomicMax(int* address, int value) {
  return emu::update_atomically(address, [=](int old) { return old < value ? value : old; });
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return emu::update_atomically(address, [=](unsigned old) { return old < value ? value : old; });
}
inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  return emu::update_atomically(address, [=](unsigned long long old) { return old < value ? value : old; });
}
inline int atomicOr(int* address, int value) {
  return emu::update_atomically(address, [=](int old) { return old | value; });
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return emu::update_atomically(address, [=](unsigned old) { return old | value; });
}
inline unsigned long long atomicOr(unsigned long long* address, unsigned long long value) {
  return emu::update_atomically(address, [=](unsigned long long old) { return old | value; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }

// Not std::bit_cast, which is a call that ThreadSanitizer records.
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline long long __double_as_longlong(double value) { return __builtin_bit_cast(long long, value); }
inline double __longlong_as_double(long long bits) { return __builtin_bit_cast(double, bits); }

// Exactly rounded where the GPU's may be off by two units in the last place.
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
