// transform_: rows [0, count) of the bank become scale * row + shift, in place; the map becomes the identity.
//
//   in, out  bank [M, D]; scale, shift [D] in double
//   in       count [1]
//   out      sums [2, D] of the rows as written
//   math, grid, keeps, needs, order: rewrite.cuh
//
// follow: the same of rows that the screen has mapped already. At every kRecount-th step they are added up; at others the
// sums are mapped as the rows are, S1' = a S1 + n b and S2' = a^2 S2 + 2 a b S1 + n b^2. What that leaves out, the
// rounding of each value to float, is unbiased: of a sum of n values it is 2^-25 sqrt(n) of one.
#include "rewrite.cuh"

namespace xbn::cuda {
namespace {

constexpr int64_t kRecount = 1024;  // steps

struct PendingMap {
  double* scale;
  double* shift;
  const int64_t* count;

  __device__ bool needed(int64_t) const { return true; }
  __device__ Affine at(int64_t d, int64_t) const { return {scale[d], shift[d]}; }
  __device__ void finish(int64_t d, int64_t) const {
    scale[d] = 1;
    shift[d] = 0;
  }
  __device__ void leave(int64_t, int64_t) const {}
};

// Of rows that the screen has moved.
struct FollowedMap : PendingMap {
  double* sums;
  const int64_t* step;
  int64_t D;

  __device__ bool needed(int64_t) const { return *step % kRecount == 0; }
  __device__ Affine at(int64_t, int64_t) const { return {1.0, -0.0}; }  // -0.0 + -0.0 is -0.0: no bit of a row changes

  __device__ void leave(int64_t d, int64_t rows) const {
    // As the rows were mapped: in float.
    const double a = static_cast<float>(scale[d]), b = static_cast<float>(shift[d]), n = static_cast<double>(rows);
    const double sum = sums[d], sum_squares = sums[D + d];
    sums[d] = a * sum + n * b;
    sums[D + d] = a * a * sum_squares + 2 * a * b * sum + n * b * b;
    finish(d, rows);
  }
};

}  // namespace

template <typename S>
int transform(const TransformParams<S>& p, const Gpu& gpu) {
  return rewrite(p.bank, p.sums, PendingMap{p.scale, p.shift, p.count}, p.M, p.D, gpu);
}

#define XBN_INSTANTIATE(S, ...) template int transform(const TransformParams<S>&, const Gpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

int follow(const TransformParams<float>& p, const Gpu& gpu) {
  return rewrite(p.bank, p.sums, FollowedMap{{p.scale, p.shift, p.count}, p.sums, p.step, p.D}, p.M, p.D, gpu);
}

}  // namespace xbn::cuda
