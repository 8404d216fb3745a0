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

int64_t rewrite_workspace(int64_t M, int64_t D) { return RewriteWorkspace(nullptr, M, D).bytes; }

template <typename S>
int launch_transform(const TransformParams<S>& p, const Launch& launch) {
  return launch_rewrite(p.bank, p.sums, PendingMap{p.scale, p.shift, p.count}, p.M, p.D, launch);
}

template int launch_transform(const TransformParams<float>&, const Launch&);
template int launch_transform(const TransformParams<double>&, const Launch&);
template int launch_transform(const TransformParams<Float16>&, const Launch&);
template int launch_transform(const TransformParams<BFloat16>&, const Launch&);

}  // namespace xbn::cuda
