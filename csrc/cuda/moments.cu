// moments, track_: mean and biased standard deviation of the rows of x that are in the mask and finite; then, in the
// same launch, one step of the filter on them and the affine map that gives the bank the filtered moments.
//
//   in     x [B, D], mask [B] or null; for track_ also sums [2, D] and count of the stored rows
//   out    mean, std [D], rows [1] in double; for track_ also target_mean, target_std, variance, scale, shift; stats [3]:
//          the gap between the moments of bank and batch before and after the map, the gain; or null
//   math   per block: sums shifted by its first usable row, so that a mean far from zero costs no digits;
//          a block's pivot is a value of x, and blocks are merged by what they are off the first pivot p0:
//          off_b = (pivot_b - p0) + sum_b / n_b,  o = sum_b n_b off_b / n,  mean = p0 + o,
//          var = sum_b (M2_b + n_b (off_b - o)^2) / n;  filter and map: formulas.h
//   grid   up to 64 blocks of 256 threads, each a run of rows; 32 to 256 threads side by side on the columns
//   keeps  three doubles per column and block in the workspace
//   needs  any GPU; float and double
//   order  fixed: threads in order within a block, blocks in order by the one that finishes last. Same bits every run.
#include "reduce.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;   // per multiprocessor at least: left to itself the compiler spills to fit more in
constexpr int kMinRows = 8;  // a warp each
constexpr int64_t kMaxBlocks = 64;

struct Plan {
  int64_t rows;  // of a block
  int64_t blocks;
};

Plan plan_moments(int64_t B) {
  const int64_t rows = larger(kMinRows, ceil_div(B, kMaxBlocks));
  return {rows, larger(1, ceil_div(B, rows))};
}

struct Workspace {
  unsigned* ticket;     // [1]
  int64_t* rows;        // [blocks] usable rows
  double* pivot;        // [blocks, D] a value of the column
  double* mean;         // [blocks, D] off the pivot
  double* sum_squares;  // [blocks, D] of deviations from that mean
  bool* usable;         // [B]
  int64_t bytes;

  Workspace(void* memory, int64_t B, int64_t D) {
    const int64_t blocks = plan_moments(B).blocks;
    Carver carve(memory);
    ticket = carve.take<unsigned>(1);
    rows = carve.take<int64_t>(blocks);
    pivot = carve.take<double>(blocks * D);
    mean = carve.take<double>(blocks * D);
    sum_squares = carve.take<double>(blocks * D);
    usable = carve.take<bool>(B);
    bytes = carve.bytes();
  }
};

// Moments of this block's rows [begin, end), into the workspace.
template <typename T>
__device__ void measure_rows(const MomentsParams<T>& p, const Workspace& w, int64_t begin, int64_t end, int columns) {
  __shared__ double partial[2][kThreads];
  const int thread = threadIdx.x;
  for (int64_t i = begin + thread / kWarp; i < end; i += kThreads / kWarp) {
    const bool finite = warp_row_is_finite(p.x + i * p.D, p.D);
    if (thread % kWarp == 0) w.usable[i] = finite && (p.mask == nullptr || p.mask[i]);
  }
  __syncthreads();

  int64_t n = 0, first = end;
  for (int64_t i = end - 1; i >= begin; --i)
    if (w.usable[i]) ++n, first = i;
  if (thread == 0) w.rows[blockIdx.x] = n;
  if (n == 0) return;

  const int column = thread % columns, lane = thread / columns, lanes = kThreads / columns;
  for (int64_t d0 = 0; d0 < p.D; d0 += columns) {
    const int64_t d = d0 + column;
    double sum = 0, sum_squares = 0, pivot = 0;
    if (d < p.D) {
      pivot = static_cast<double>(p.x[first * p.D + d]);
#pragma unroll 4
      for (int64_t i = begin + lane; i < end; i += lanes) {
        if (!w.usable[i]) continue;
        const double v = static_cast<double>(p.x[i * p.D + d]) - pivot;
        sum += v;
        sum_squares += v * v;
      }
    }
    partial[0][thread] = sum;
    partial[1][thread] = sum_squares;
    __syncthreads();
    if (lane == 0 && d < p.D) {
      for (int k = 1; k < lanes; ++k) {
        sum += partial[0][k * columns + column];
        sum_squares += partial[1][k * columns + column];
      }
      const double off = sum / static_cast<double>(n), deviation = sum_squares - sum * off;
      w.pivot[blockIdx.x * p.D + d] = pivot;
      w.mean[blockIdx.x * p.D + d] = off;
      w.sum_squares[blockIdx.x * p.D + d] = deviation > 0 ? deviation : 0;
    }
    __syncthreads();
  }
}

// Moments of one column over all blocks, in order. rows: of the blocks; first: the first that has any; n: in all.
__device__ Moments merge_blocks(const Workspace& w, const double* rows, int64_t blocks, int64_t first, double n,
                                int64_t D, int64_t d) {
  if (first == blocks) return {0.0, 0.0};
  const double pivot = __ldcg(w.pivot + first * D + d);
  const auto off = [&](int64_t b) { return (__ldcg(w.pivot + b * D + d) - pivot) + __ldcg(w.mean + b * D + d); };
  double sum = 0;
#pragma unroll 4
  for (int64_t b = first; b < blocks; ++b)
    if (rows[b] > 0) sum += rows[b] * off(b);  // a block without rows has left nothing
  const double mean = sum / n;
  double sum_squares = 0;
#pragma unroll 4
  for (int64_t b = first; b < blocks; ++b)
    if (rows[b] > 0) sum_squares += __ldcg(w.sum_squares + b * D + d) + rows[b] * (off(b) - mean) * (off(b) - mean);
  return {pivot + mean, std::sqrt(sum_squares / n)};
}

template <typename T, bool kTrack>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const MomentsParams<T> p, const TrackParams t, const Workspace w, int64_t rows_of_block,
                   int columns) {
  __shared__ bool last;
  const int64_t begin = blockIdx.x * rows_of_block;
  measure_rows(p, w, begin, smaller(begin + rows_of_block, p.B), columns);
  if (!is_last_block(w.ticket, gridDim.x, &last)) return;

  __shared__ double rows_of[kMaxBlocks];
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) rows_of[b] = static_cast<double>(__ldcg(w.rows + b));
  __syncthreads();
  double n = 0;
  int64_t first = gridDim.x;
  for (int64_t b = gridDim.x - 1; b >= 0; --b) {
    n += rows_of[b];
    if (rows_of[b] > 0) first = b;
  }
  const int64_t rows = static_cast<int64_t>(n);
  if (threadIdx.x == 0) *p.rows = rows;
  KalmanGain k = {};
  int64_t count = 0;
  if constexpr (kTrack) {
    k = filter_step(*t.variance, rows, t.process_noise, t.measurement_noise, t.fixed_gain);
    count = larger(0, *t.count);
  }
  const bool known = kTrack && std::isfinite(k.variance);  // if nothing is, there is nothing to match
  double before = 0, after = 0;                            // squared gaps
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    const Moments measured = merge_blocks(w, rows_of, gridDim.x, first, n, p.D, d);
    p.mean[d] = measured.mean;
    p.std[d] = measured.std;
    if constexpr (kTrack) {
      const Moments target = {kalman_state(t.target_mean[d], measured.mean, k.gain),
                              kalman_state(t.target_std[d], measured.std, k.gain)};
      t.target_mean[d] = target.mean;
      t.target_std[d] = target.std;
      const Moments stored = bank_moments(t.sums[d], t.sums[p.D + d], count);
      const Affine pending = {t.scale[d], t.shift[d]};
      const Affine map = known ? follow(pending, stored, target, t.eps) : pending;
      before += squared_gap(moved(stored, pending), measured);
      after += squared_gap(moved(stored, map), measured);
      t.scale[d] = map.scale;
      t.shift[d] = map.shift;
    }
  }
  if constexpr (kTrack) {
    __syncthreads();  // every thread has read the variance
    if (threadIdx.x == 0) *t.variance = k.variance;
    if (t.stats == nullptr) return;
    const BlockSums<kThreads, 2> gaps({before, after});
    if (threadIdx.x < 2) t.stats[threadIdx.x] = moment_gap(gaps[threadIdx.x], rows, count);
    if (threadIdx.x == 2) t.stats[2] = k.gain;
  }
}

template <typename T, bool kTrack>
int launch(const MomentsParams<T>& p, const TrackParams& t, const Launch& launch) {
  const Plan plan = plan_moments(p.B);
  const Workspace w(launch.workspace, p.B, p.D);
  int columns = kWarp;  // threads side by side on the columns
  while (columns < kThreads && columns < p.D) columns *= 2;
  const int error = cudaMemsetAsync(w.ticket, 0, sizeof(unsigned), static_cast<cudaStream_t>(launch.stream));
  if (error != cudaSuccess) return error;
  return run(moments_kernel<T, kTrack>, dim3(static_cast<unsigned>(plan.blocks)), kThreads, launch, p, t, w, plan.rows,
             columns);
}

}  // namespace

int64_t moments_workspace(int64_t B, int64_t D) { return Workspace(nullptr, B, D).bytes; }

template <typename T>
int launch_moments(const MomentsParams<T>& p, const Launch& launch_at) {
  return launch<T, false>(p, TrackParams{}, launch_at);
}

template <typename T>
int launch_track(const MomentsParams<T>& moments, const TrackParams& p, const Launch& launch_at) {
  return launch<T, true>(moments, p, launch_at);
}

template int launch_moments(const MomentsParams<float>&, const Launch&);
template int launch_moments(const MomentsParams<double>&, const Launch&);
template int launch_track(const MomentsParams<float>&, const TrackParams&, const Launch&);
template int launch_track(const MomentsParams<double>&, const TrackParams&, const Launch&);

}  // namespace xbn::cuda
