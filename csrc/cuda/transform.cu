// transform_: rows [0, count) of the bank become scale * row + shift, in place; the map becomes the identity.
//
//   in, out  bank [M, D]; scale, shift [D] in double
//   in       count [1]
//   out      sums [2, D] of the rows as written
//   math, grid, keeps, needs, order: rewrite.cuh
#include "rewrite.cuh"

namespace xbn::cuda {
namespace {

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
};

}  // namespace

template <typename S>
int transform(const TransformParams<S>& p, const Gpu& gpu) {
  return rewrite(p.bank, p.sums, PendingMap{p.scale, p.shift, p.count}, p.M, p.D, gpu);
}

#define XBN_INSTANTIATE(S, ...) template int transform(const TransformParams<S>&, const Gpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
