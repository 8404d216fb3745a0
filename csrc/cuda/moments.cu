// moments, track_: mean and biased standard deviation of the rows of x that are in the mask and finite; then, in the
// same launch, one step of the filter on them and the affine map that gives the bank the filtered moments.
//
//   in     x [B, D], mask [B] or null; for track_ also sums [2, D] and count of the stored rows
//   out    mean, std [D], rows [1] in double; for track_ also target_mean, target_std, variance, innovation or null,
//          scale, shift; stats [3]: the gap between the moments of bank and batch before and after the map, and the
//          gain; or null
//   math   sums in double, shifted by the first usable row, so that a mean far from zero costs no digits:
//          off = sum / n,  mean = pivot + off,  var = (sum of squares - sum off) / n;  filter and map: formulas.h
//   grid   usable_kernel: a warp to a row, to find those that count. moments_kernel: a block to 8 columns and all rows,
//          1024 of them in flight; then a warp to a column. The gaps and the innovations' products are added up by the
//          block that finishes last
//   keeps  a flag per row and five doubles per column in the workspace
//   needs  any GPU; float and double; four columns at once where D and the address allow it
//   order  fixed by the shapes: threads take every 128th row (every 32nd, one column at a time), their sums are added
//          in a fixed tree. Same bits every run
#include "reduce.cuh"
#include "rows.cuh"

namespace xbn::cuda {
namespace {

constexpr int kBlocks = 1;  // per multiprocessor at least: there is one to eight columns

struct Workspace {
  unsigned* ticket;  // [1]
  double* gaps;      // [5, D] squared, before and after the map; the products of innovations
  uint8_t* usable;   // [B]
  int64_t bytes;

  Workspace(void* memory, int64_t B, int64_t D) {
    Carver carve(memory);
    ticket = carve.take<unsigned>(1);
    gaps = carve.take<double>(5 * D);
    usable = carve.take<uint8_t>(B);
    bytes = carve.bytes();
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) usable_kernel(const MomentsParams<T> p, const Workspace w) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.ticket = 0;
  const int64_t i = row_of_warp();
  if (i >= p.B) return;
  const bool chosen = is_marked(p.mask, i);
  const bool finite = all_of_row<kWidth>(p.x + i * p.D, p.D, [](T x, int64_t) { return is_finite(x); });
  if (threadIdx.x % kWarp == 0) w.usable[i] = finite && chosen;
}

// What the filter and the map know of a column.
struct Column {
  Moments target;
  double sum, sum_squares;  // of the stored rows
  Affine pending;
  double innovation;  // of the batch before
};

template <typename T, bool kTrack, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const MomentsParams<T> p, const TrackParams t, const Workspace w) {
  constexpr int kDeep = Tile<kWidth>::kDeep, kRows = kChunk / kDeep;
  __shared__ unsigned words[2][kWarp];
  const int first_row = Tile<kWidth>::first_row();
  const int64_t d = Tile<kWidth>::first_column(), mine = column_of_warp();
  const bool reports = threadIdx.x % kWarp == 0 && mine < p.D;
  int64_t n = 0, count = 0;
  double sum[kWidth] = {}, sum_squares[kWidth] = {}, pivot[kWidth] = {}, pivot_of_mine = 0, variance = 0;
  Column column = {};
  if constexpr (kTrack) {  // read now, for it takes as long as the rows
    variance = *t.variance;
    count = *t.count;
    if (reports)
      column = {{t.target_mean[mine], t.target_std[mine]},
                t.sums[mine],
                t.sums[p.D + mine],
                {t.scale[mine], t.shift[mine]},
                t.innovation == nullptr ? 0.0 : t.innovation[mine]};
  }

  for (int64_t begin = 0; begin < p.B; begin += kChunk) {
    const int rows = static_cast<int>(smaller(kChunk, p.B - begin));
    const auto at = [&](int row) { return p.x + (begin + row) * p.D; };
    const Flags::Read read(w.usable, begin, p.B);
    Vector<T, kWidth> x[kRows];  // on their way while the flags are
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int row = q * kDeep + first_row;
      if (row < rows && d < p.D) x[q] = *reinterpret_cast<const Vector<T, kWidth>*>(at(row) + d);
    }
    const Flags flags(read, words[begin / kChunk % 2]);
    if (flags.total() == 0) continue;
    if (n == 0) {
      const int first = flags.first();
      if (mine < p.D) pivot_of_mine = static_cast<double>(at(first)[mine]);
      if (d < p.D) {
        const auto values = *reinterpret_cast<const Vector<T, kWidth>*>(at(first) + d);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) pivot[c] = static_cast<double>(values.value[c]);
      }
    }
    n += flags.total();
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int row = q * kDeep + first_row;
      if (q * kDeep >= rows) break;
      const bool usable = flags.has(row);  // by all lanes
      if (!usable || d >= p.D) continue;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const double v = static_cast<double>(x[q].value[c]) - pivot[c];
        sum[c] += v;
        sum_squares[c] += v * v;
      }
    }
  }

  const ColumnSums all = sum_columns(sum, sum_squares);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.rows = n;
  Moments measured = {0.0, 0.0};
  if (n > 0) {
    const double off = all.sum / static_cast<double>(n), deviation = all.sum_squares - all.sum * off;
    measured = {pivot_of_mine + off, std::sqrt((deviation > 0 ? deviation : 0) / static_cast<double>(n))};
  }
  if (reports) {
    p.mean[mine] = measured.mean;
    p.std[mine] = measured.std;
  }
  if constexpr (kTrack) {
    __shared__ bool last;
    const KalmanGain k = filter_step(variance, n, t.process_noise, t.measurement_noise, t.fixed_gain);
    const bool adapts = t.innovation != nullptr && n >= 2 && !t.only_measures;
    count = larger(0, count);
    if (reports) {
      if (adapts) {
        const double innovation = innovation_of(column.target.mean, measured.mean, variance);
        t.innovation[mine] = innovation;
        w.gaps[2 * p.D + mine] = innovation * column.innovation;
        w.gaps[3 * p.D + mine] = innovation * innovation;
        w.gaps[4 * p.D + mine] = column.innovation * column.innovation;
      }
      const Moments target = {kalman_state(column.target.mean, measured.mean, k.gain),
                              kalman_state(column.target.std, measured.std, k.gain)};
      const Moments stored = bank_moments(column.sum, column.sum_squares, count);
      const bool known = std::isfinite(k.variance);  // if nothing is, there is nothing to match
      const Affine map = known ? follow(column.pending, stored, target, t.eps) : column.pending;
      if (!t.only_measures) {
        t.target_mean[mine] = target.mean;
        t.target_std[mine] = target.std;
        t.scale[mine] = map.scale;
        t.shift[mine] = map.shift;
      }
      w.gaps[mine] = squared_gap(moved(stored, column.pending), measured);
      w.gaps[p.D + mine] = squared_gap(moved(stored, map), measured);
    }
    if (!is_last_block(w.ticket, gridDim.x, &last)) return;
    // The variance, which every block has read, is written here.
    if (threadIdx.x == 0 && !t.only_measures && !adapts) *t.variance = k.variance;
    if (t.stats == nullptr && !adapts) return;
    double sums[5] = {};
    for (int64_t i = threadIdx.x; i < p.D; i += kThreads)
#pragma unroll
      for (int s = 0; s < 5; ++s)
        if (s < 2 || adapts) sums[s] += __ldcg(w.gaps + s * p.D + i);
    const BlockSums<kThreads, 5> gaps(sums);
    if (threadIdx.x == 0 && adapts) *t.variance = adapted_variance(k, t.measurement_noise, {gaps[2], gaps[3], gaps[4]});
    if (t.stats == nullptr) return;
    if (threadIdx.x < 2) t.stats[threadIdx.x] = moment_gap(gaps[threadIdx.x], n, count);
    if (threadIdx.x == 2) t.stats[2] = k.gain;
  }
}

template <int kWidth, bool kTrack, typename T>
int measure_in(const MomentsParams<T>& p, const TrackParams& t, const Gpu& gpu) {
  const auto w = make_workspace<Workspace>(gpu, p.B, p.D);
  const dim3 rows(static_cast<unsigned>(larger(1, ceil_div(p.B, kWarps))));
  const int error = run(usable_kernel<T, kWidth>, rows, kThreads, gpu, p, w);
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(ceil_div(p.D, kColumns)));
  return run(moments_kernel<T, kTrack, kWidth>, columns, kThreads, gpu, p, t, w);
}

template <typename T, bool kTrack>
int measure(const MomentsParams<T>& p, const TrackParams& t, const Gpu& gpu) {
  const bool wide = p.D % kWide == 0 && is_aligned<T, kWide>(p.x);
  return wide ? measure_in<kWide, kTrack>(p, t, gpu) : measure_in<1, kTrack>(p, t, gpu);
}

}  // namespace

template <typename T>
int moments(const MomentsParams<T>& p, const Gpu& gpu) {
  return measure<T, false>(p, TrackParams{}, gpu);
}

template <typename T>
int track(const MomentsParams<T>& measured, const TrackParams& p, const Gpu& gpu) {
  return measure<T, true>(measured, p, gpu);
}

template int moments(const MomentsParams<float>&, const Gpu&);
template int moments(const MomentsParams<double>&, const Gpu&);
template int track(const MomentsParams<float>&, const TrackParams&, const Gpu&);
template int track(const MomentsParams<double>&, const TrackParams&, const Gpu&);

}  // namespace xbn::cuda
