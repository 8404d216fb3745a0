// standardize_: if the stored coordinates have wandered off, the bank is rewritten in standardised ones and the pending
// map compensates. The device decides: the host does not wait, and the pass ends at once where there is nothing to do.
//
//   in, out  bank [M, D], sums [2, D], scale [D], shift [D]
//   in       count [1]; ring_sums [2, D] and ring_count [1]: of all the rows that share the map
//   math     u' = a u + b with a = 1 / std(u), b = -mean(u) a;  scale' = scale / a, shift' = shift - scale' b
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

  __device__ bool is_live(Moments stored, int64_t d) const { return std::fabs(scale[d]) * stored.std >= eps; }

  __device__ bool needed(int64_t) const {
    bool off = false;
    for (int64_t d = threadIdx.x; d < D && *ring_count > 0; d += blockDim.x) {
      const Moments stored = stored_at(d);
      off = off || (is_live(stored, d) && off_standard(stored));
    }
    return __syncthreads_or(off);
  }

  __device__ Affine at(int64_t d, int64_t) const {
    const Moments stored = stored_at(d);
    if (!is_live(stored, d)) return {1, 0};  // a dead dimension has no coordinate to standardise
    using C = typename Compute<S>::type;     // rounded as it is used, so that the map undoes just that
    const double a = static_cast<double>(static_cast<C>(1.0 / stored.std));
    return {a, static_cast<double>(static_cast<C>(-stored.mean * a))};
  }

  __device__ void finish(int64_t d, int64_t rows) const {
    const Affine affine = at(d, rows);
    scale[d] /= affine.scale;
    shift[d] -= scale[d] * affine.shift;
  }
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
