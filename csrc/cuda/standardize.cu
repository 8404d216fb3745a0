// standardize_: if the stored coordinates have wandered off, the bank is rewritten in standardised ones and the pending
// map compensates. The device decides: the host does not wait, and the pass ends at once where there is nothing to do.
//
//   in, out  bank [M, D], sums [2, D], scale [D], shift [D]
//   in       count [1]; ring_sums [2, D] and ring_count [1]: of all the rows that share the map
//   math     u' = a u + b with a = 1 / std(u), b = -mean(u) a;  scale' = scale / a, shift' = shift - scale' b
//            of a dead dimension with a scale far from 1, a = scale
//   grid, keeps, needs, order: rewrite.cuh; every block looks at all D columns to decide
#include "rewrite.cuh"

namespace xbn::cuda {
namespace {

template <typename S>
struct StandardMap {
  const double* ring_sums;
  const int64_t* ring_count;
  double* scale;
  double* shift;
  const int64_t* count;
  int64_t D;
  double eps;

  __device__ Moments stored_at(int64_t d) const {
    return bank_moments(ring_sums[d], ring_sums[D + d], larger(0, *ring_count));  // a damaged count is no division by 0
  }

  __device__ bool needed(int64_t) const {
    bool off = false;
    for (int64_t d = threadIdx.x; d < D && *ring_count > 0; d += blockDim.x)
      off = off || off_standard(stored_at(d), scale[d], eps);
    return __syncthreads_or(off);
  }

  __device__ Affine at(int64_t d, int64_t) const {
    return to_standard<typename Compute<S>::type>(stored_at(d), scale[d], eps);
  }

  __device__ void finish(int64_t d, int64_t rows) const {
    const Affine affine = at(d, rows);
    scale[d] /= affine.scale;
    shift[d] -= scale[d] * affine.shift;
  }

  __device__ void leave(int64_t, int64_t) const {}
};

}  // namespace

template <typename S>
int standardize(const StandardizeParams<S>& p, const Gpu& gpu) {
  const StandardMap<S> map = {p.ring_sums, p.ring_count, p.scale, p.shift, p.count, p.D, p.eps};
  return rewrite(p.bank, p.sums, map, p.M, p.D, gpu);
}

#define XBN_INSTANTIATE(S, ...) template int standardize(const StandardizeParams<S>&, const Gpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
