// What the screen of memory_loss hands to the exact pairs behind it. screened.cu has both; the kernels are in
// screen.cu and pairs.cu.
#pragma once

#include "anchor.cuh"

namespace xbn::cuda {

// How far the screen's similarity of a pair may be from the true one, in parts: screen.cu derives them.
struct ScreenBound {
  float product;  // of |z| |r|
  float number;   // of |z| + |r|
  float norm;     // of |margin| max(|r|, eps)
  float map;      // of |shift| (|z| + |margin|)
  float least;    // of |margin|
};

ScreenBound screen_bound(int64_t D);

struct Screen {
  uint32_t* mask;  // [B, words] bit j % 32 of word j / 32: row j may have a weight; beyond the count, anything
  unsigned long long* found;  // [1] how many may
  unsigned* many;             // [1] whether they are too many

  __host__ __device__ static int64_t words(int64_t M) { return ceil_div(M, 32); }

  static Screen carve(Carver& carve, int64_t B, int64_t M) {
    Screen screen;
    screen.mask = carve.take<uint32_t>(B * words(M));
    screen.found = carve.take<unsigned long long>(1);
    screen.many = carve.take<unsigned>(1);
    return screen;
  }
};

// B, M > 0; z and bank can be read by 16 bytes. `margin` is that of negatives. `moving`, or null: the float32 bank, in
// which rows [0, count) become scale * row + shift; neither map nor sums change. `p` then has no map.
template <typename S>
int launch_screen(const TransformParams<S>* moving, const MemoryLossParams<float, S>& p, float margin,
                  const ScreenBound& bound, const Screen& screen, const Gpu& gpu);

// Says whether the screen has left many pairs, more than a share of `most`; if not, fills the splits of the shortcut.
template <typename S>
int launch_pairs(const MemoryLossParams<float, S>& p, const Pass& pass, const Screen& screen, double most,
                 const PartialLoss<float>& partial, const Gpu& gpu);

}  // namespace xbn::cuda
