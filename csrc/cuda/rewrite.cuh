// The pass over the bank that transform_, standardize_ and a recount of its sums share: rows [0, count) become a * row + b
// in place, and their sums are taken in the same pass.
//
//   in, out  bank [M, D]
//   in       a Map: whether the pass is needed at all, and (a, b) of a column; it finishes a column, or leaves it where
//            no pass is needed
//   out      sums [2, D] in double: sum and sum of squares of the rows as rounded to the bank's dtype
//   grid     rewrite_kernel: (runs of rows, tiles of columns) x 256 threads, a thread to one 16-byte vector of columns;
//            sums_kernel: a block to 8 columns, every run by one of 32 threads
//   keeps    two doubles per run and column in the workspace
//   needs    16-byte accesses where D and the bank's address allow them, else one element at a time
//   order    the number of runs depends on M alone; the rows of a run are added in order, the runs in a
//            fixed tree. Same bits every run.
//   why two launches: all runs must have read the map before it changes, and adding up the runs in one block would
//            take longer than the pass.
#pragma once

#include "rows.cuh"

namespace xbn::cuda {
namespace {

constexpr int kRewriteThreads = 256;
constexpr int kBatch = 4;          // rows of a thread in flight
constexpr int64_t kMinRun = 64;    // rows
constexpr int64_t kMaxRuns = 384;  // three blocks on each of 128 multiprocessors
constexpr int kSumBatch = 6;       // runs of a thread in flight

struct RewriteWorkspace {
  bool* needed;     // [1]
  double* partial;  // [runs, 2, D]
  int64_t runs;
  int64_t bytes;

  RewriteWorkspace(void* memory, int64_t M, int64_t D) : runs(larger(1, smaller(ceil_div(M, kMinRun), kMaxRuns))) {
    Carver carve(memory);
    needed = carve.take<bool>(1);
    partial = carve.take<double>(runs * 2 * D);
    bytes = carve.bytes();
  }
};

template <typename S, int kWidth, typename Map>
__global__ void __launch_bounds__(kRewriteThreads, kWidth <= 4 ? 3 : 2)
    rewrite_kernel(S* bank, const Map map, int64_t M, int64_t D, int columns, const RewriteWorkspace w) {
  using Row = Vector<S, kWidth>;
  using C = typename Compute<S>::type;
  __shared__ double partial[2][kRewriteThreads];
  const int64_t count = stored_rows(map.count, M);
  const bool needed = map.needed(count);  // by all threads, the same in all
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *w.needed = needed;
  if (!needed) return;

  const int column = threadIdx.x % columns, lane = threadIdx.x / columns, lanes = kRewriteThreads / columns;
  const int64_t d = (static_cast<int64_t>(blockIdx.y) * columns + column) * kWidth;
  const int64_t run = ceil_div(count, gridDim.x);
  const int64_t begin = blockIdx.x * run, end = smaller(begin + run, count);
  double sum[kWidth] = {}, sum_squares[kWidth] = {};
  if (d < D) {
    C a[kWidth], b[kWidth];
    for (int c = 0; c < kWidth; ++c) {
      const Affine affine = map.at(d + c, count);
      a[c] = static_cast<C>(affine.scale);
      b[c] = static_cast<C>(affine.shift);
    }
    // Rows are loaded some at a time: a store could be to any of the rows, so the compiler moves no load across it.
    for (int64_t j = begin + lane; j < end; j += kBatch * lanes) {
      Row rows[kBatch];
#pragma unroll
      for (int q = 0; q < kBatch; ++q)
        if (j + q * lanes < end) rows[q] = *reinterpret_cast<const Row*>(bank + (j + q * lanes) * D + d);
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        if (j + q * lanes >= end) break;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          rows[q].value[c] = static_cast<S>(std::fma(a[c], static_cast<C>(rows[q].value[c]), b[c]));
          const double r = static_cast<double>(static_cast<C>(rows[q].value[c]));
          sum[c] += r;
          sum_squares[c] += r * r;
        }
        *reinterpret_cast<Row*>(bank + (j + q * lanes) * D + d) = rows[q];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    partial[0][threadIdx.x] = sum[c];
    partial[1][threadIdx.x] = sum_squares[c];
    __syncthreads();
    if (lane == 0 && d < D) {
      for (int k = 1; k < lanes; ++k) {
        sum[c] += partial[0][k * columns + column];
        sum_squares[c] += partial[1][k * columns + column];
      }
      w.partial[(blockIdx.x * 2 + 0) * D + d + c] = sum[c];
      w.partial[(blockIdx.x * 2 + 1) * D + d + c] = sum_squares[c];
    }
    __syncthreads();
  }
}

template <typename Map>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const Map map, double* sums, int64_t M, int64_t D, const RewriteWorkspace w) {
  constexpr int kDeep = Tile<1>::kDeep;
  const int64_t d = Tile<1>::first_column(), mine = column_of_warp(), count = stored_rows(map.count, M);
  const bool reports = threadIdx.x % kWarp == 0 && mine < D;
  if (!*w.needed) {
    if (reports) map.leave(mine, count);
    return;
  }
  double sum[1] = {}, sum_squares[1] = {};
  if (d < D) {
    for (int64_t first = Tile<1>::first_row(); first < w.runs; first += kSumBatch * kDeep) {
      double of_run[kSumBatch][2];
#pragma unroll
      for (int q = 0; q < kSumBatch; ++q)
        if (first + q * kDeep < w.runs) {
          const double* partial = w.partial + (first + q * kDeep) * 2 * D + d;
          of_run[q][0] = partial[0];
          of_run[q][1] = partial[D];
        }
#pragma unroll
      for (int q = 0; q < kSumBatch; ++q)
        if (first + q * kDeep < w.runs) sum[0] += of_run[q][0], sum_squares[0] += of_run[q][1];
    }
  }
  const ColumnSums all = sum_columns(sum, sum_squares);
  if (!reports) return;
  map.finish(mine, count);  // reads the old sums of its column
  sums[mine] = all.sum;
  sums[D + mine] = all.sum_squares;
}

template <int kWidth, typename S, typename Map>
int rewrite_of(S* bank, double* sums, const Map& map, int64_t M, int64_t D, const Gpu& gpu) {
  const auto w = make_workspace<RewriteWorkspace>(gpu, M, D);
  int columns = 1;
  while (columns < kRewriteThreads && columns * kWidth < D) columns *= 2;
  const dim3 grid(static_cast<unsigned>(w.runs), static_cast<unsigned>(ceil_div(D, columns * kWidth)));
  const int error = run(rewrite_kernel<S, kWidth, Map>, grid, kRewriteThreads, gpu, bank, map, M, D, columns, w);
  if (error != cudaSuccess) return error;
  const dim3 blocks(static_cast<unsigned>(ceil_div(D, kColumns)));
  return run(sums_kernel<Map>, blocks, kThreads, gpu, map, sums, M, D, w);
}

template <typename S, typename Map>
int rewrite(S* bank, double* sums, const Map& map, int64_t M, int64_t D, const Gpu& gpu) {
  constexpr int kWidth = 16 / sizeof(S);
  if (D % kWidth == 0 && reinterpret_cast<uintptr_t>(bank) % 16 == 0)
    return rewrite_of<kWidth>(bank, sums, map, M, D, gpu);
  return rewrite_of<1>(bank, sums, map, M, D, gpu);
}

}  // namespace
}  // namespace xbn::cuda
