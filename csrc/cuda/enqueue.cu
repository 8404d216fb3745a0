// enqueue_: the rows of z that are in the mask and finite enter the ring, the oldest rows leave.
//
//   in       z [B, D], labels [B], mask and ids [B] or null, step [1]; scale, shift [D] of the pending map
//   in, out  bank [rows, D], which is slots [first, first + rows) of a ring of M, bank_labels [rows], bank_ids and
//            bank_steps [rows] or null, sums [2, D], head [1], count [1]
//   out      slots [B]: where each row went, -1 where it was not stored
//   math     stored as u = (z - shift) / scale, rounded to the bank's dtype. A row whose u is not finite is left out.
//            More rows than the ring holds: the last M of them stay. The quotient is a product with 1 / scale and one
//            step of correction, which rounds as the division does: the CPU kernel stores the same bits
//   grid     storable_kernel: a warp to a row, to find the rows that can be stored. store_kernel: a block to 8 columns
//            and all rows, up to 512 of them in flight; every block works out the slots from the flags, writes the rows
//            of its columns and moves their sums by what enters and what leaves. What goes with a row is dealt to the
//            blocks, 32 rows to each; the first block moves the ring on
//   keeps    a flag per row, and the counters as they were, in the workspace
//   needs    any GPU; four columns at once where D and the addresses allow it
//   order    fixed by the shapes: threads take every 128th row (every 32nd, one column at a time), their sums are added
//            in a fixed tree. Same bits every run
#include "rows.cuh"

namespace xbn::cuda {
namespace {

constexpr int kBlocks = 1;  // per multiprocessor at least: there is one to eight columns
template <int kWidth>
constexpr int kBatchOf = kWidth > 1 ? 4 : 8;  // rows of a thread in flight

struct Workspace {
  int64_t* filled;    // [1] stored rows before this call
  int64_t* head;      // [1]
  uint8_t* storable;  // [B]
  int64_t bytes;

  Workspace(void* memory, int64_t B) {
    Carver carve(memory);
    filled = carve.take<int64_t>(1);
    head = carve.take<int64_t>(1);
    storable = carve.take<uint8_t>(B);
    bytes = carve.bytes();
  }
};

// A quotient below this is finite in the bank's dtype, however it is rounded.
template <typename S>
constexpr double kSurelyFinite = kLargestOf<S> / 2;

// a / b, `inverse` being 1 / b: rounded as a division rounds it, unless numbers are too small or too large to be
// scaled. Not finite where 1 / b is not.
__device__ __forceinline__ double quotient(double a, double b, double inverse) {
  const double q = a * inverse, off = std::fma(-q, b, a);
  return off == 0 ? q : std::fma(off, inverse, q);  // adding 0 to -0 would change its sign
}

template <typename S>
__device__ __forceinline__ S to_stored(double u) {
  return static_cast<S>(static_cast<typename Compute<S>::type>(u));
}

template <typename T, typename S, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) storable_kernel(const EnqueueParams<T, S> p, const Workspace w) {
  const int64_t i = row_of_warp(), filled = stored_rows(p.count, p.M);
  int64_t head = *p.head;
  if (i >= p.B) return;
  const bool chosen = is_marked(p.mask, i);
  const T* row = p.z + i * p.D;
  bool finite = all_of_row<kWidth>(row, p.D, [&](T z, int64_t d) {
    const double scale = std::fabs(p.scale[d]);
    const double off = std::fabs(static_cast<double>(z) - p.shift[d]);
    return (scale > 0x1p-1000) & (off < kSurelyFinite<S> * scale);
  });
  if (!finite)  // or so large that it takes the quotient to tell
    finite = all_of_row<1>(row, p.D, [&](T z, int64_t d) {
      const double scale = p.scale[d], u = quotient(static_cast<double>(z) - p.shift[d], scale, 1 / scale);
      return is_finite(as<typename Compute<S>::type>(to_stored<S>(u)));
    });
  if (threadIdx.x % kWarp == 0) w.storable[i] = finite && chosen;
  if (head < 0 || head >= p.M) head = 0;  // a damaged counter must not become a wild write
  if (i == 0 && threadIdx.x == 0) *w.filled = filled, *w.head = head;
  const int64_t slot = (head + i) % p.M;  // of this row, if all before it are stored: what is in it is about to leave
  if (slot < filled && p.first <= slot && slot < p.first + p.rows)
    prefetch_by_warp(p.bank + (slot - p.first) * p.D, p.D);
}

template <typename T, typename S, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks) store_kernel(const EnqueueParams<T, S> p, const Workspace w) {
  constexpr int kDeep = Tile<kWidth>::kDeep, kBatch = kBatchOf<kWidth>;
  __shared__ unsigned words[2][kWarp];
  const int thread = threadIdx.x, first_row = Tile<kWidth>::first_row();
  const int64_t d = Tile<kWidth>::first_column(), filled = *w.filled, head = *w.head;
  const bool sums_up = threadIdx.x % kWarp == 0 && column_of_warp() < p.D;
  ColumnSums before = {};  // read now, for they take as long as the rows
  if (sums_up) before = {p.sums[column_of_warp()], p.sums[p.D + column_of_warp()]};
  double scale[kWidth] = {}, shift[kWidth] = {}, inverse[kWidth] = {};
  if (d < p.D) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) scale[c] = p.scale[d + c], shift[c] = p.shift[d + c];
  }
  int64_t surplus = 0;  // rows that would be overwritten at once: the first ones
  if (p.B > p.M) {
    surplus = -p.M;
    for (int64_t i = 0; i < p.B; i += kThreads)
      surplus += __syncthreads_count(i + threadIdx.x < p.B && w.storable[i + threadIdx.x]);
    surplus = larger(0, surplus);
  }

  int64_t stored = -surplus;  // rows before this chunk
  double sum[kWidth] = {}, sum_squares[kWidth] = {};
  for (int64_t begin = 0; begin < p.B; begin += kChunk) {
    const int rows = static_cast<int>(smaller(kChunk, p.B - begin));
    const Flags::Read read(w.storable, begin, p.B);
    Vector<T, kWidth> z[kBatch];
    const auto read_z = [&](int first) {
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        const int row = first + q * kDeep + first_row;
        if (row < rows && d < p.D) z[q] = *reinterpret_cast<const Vector<T, kWidth>*>(p.z + (begin + row) * p.D + d);
      }
    };
    read_z(0);  // while the flags are read
    const Flags flags(read, words[begin / kChunk % 2]);
    const auto slot_of = [&](int row) -> int64_t {
      const int rank = flags.rank(row);
      const int64_t place = stored + rank;
      if (rank < 0 || place < 0) return -1;
      return head + place < p.M ? head + place : head + place - p.M;
    };
    const auto is_here = [&](int64_t slot) { return p.first <= slot && slot < p.first + p.rows; };
#pragma unroll 1
    for (int first = 0; first < rows; first += kBatch * kDeep) {
      if (first > 0) read_z(first);
      // A batch is read before any of it is written: a store could be to any row, so the compiler moves no load across.
      int64_t slot[kBatch];
      Vector<S, kWidth> out[kBatch];
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        slot[q] = first + q * kDeep < rows ? slot_of(first + q * kDeep + first_row) : -1;
        if (is_here(slot[q]) && slot[q] < filled && d < p.D)
          out[q] = *reinterpret_cast<const Vector<S, kWidth>*>(p.bank + (slot[q] - p.first) * p.D + d);
      }
      if (begin + first == 0 && d < p.D) {  // divide while they are on their way
#pragma unroll
        for (int c = 0; c < kWidth; ++c) inverse[c] = 1 / hidden(scale[c]);
      }
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        if (!is_here(slot[q]) || d >= p.D) continue;
        Vector<S, kWidth> in;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          in.value[c] = to_stored<S>(quotient(static_cast<double>(z[q].value[c]) - shift[c], scale[c], inverse[c]));
          const double entering = as<double>(in.value[c]);
          const double leaving = slot[q] < filled ? as<double>(out[q].value[c]) : 0.0;
          sum[c] += entering - leaving;
          sum_squares[c] += entering * entering - leaving * leaving;
        }
        *reinterpret_cast<Vector<S, kWidth>*>(p.bank + (slot[q] - p.first) * p.D + d) = in;
      }
    }
    // The last warp first: where rows are few, it has none to store.
    for (int row = (kWarps - 1 - thread / kWarp) * kWarp + thread % kWarp; row - thread % kWarp < rows;
         row += kThreads) {
      if (static_cast<unsigned>((begin + row) / kWarp) % gridDim.x != blockIdx.x)
        continue;  // the same in all of a warp
      const int64_t i = begin + row, place = slot_of(row);
      if (i >= p.B) continue;
      p.slots[i] = place;
      if (!is_here(place)) continue;
      const int64_t label = p.labels[i], id = stored_id(p.ids, i, place), step = p.step != nullptr ? *p.step : 0;
      p.bank_labels[place - p.first] = label;
      if (p.bank_ids != nullptr) p.bank_ids[place - p.first] = id;
      if (p.bank_steps != nullptr) p.bank_steps[place - p.first] = step;
    }
    stored += flags.total();
  }

  const ColumnSums moved = sum_columns(sum, sum_squares);
  if (sums_up) {
    p.sums[column_of_warp()] = before.sum + moved.sum;
    p.sums[p.D + column_of_warp()] = before.sum_squares + moved.sum_squares;
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  *p.head = head + stored < p.M ? head + stored : head + stored - p.M;
  *p.count = smaller(filled + stored, p.M);
}

template <int kWidth, typename T, typename S>
int enqueue_in(const EnqueueParams<T, S>& p, const Gpu& gpu) {
  const auto w = make_workspace<Workspace>(gpu, p.B);
  const dim3 rows(static_cast<unsigned>(ceil_div(p.B, kWarps)));
  const int error = run(storable_kernel<T, S, kWidth>, rows, kThreads, gpu, p, w);
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(ceil_div(p.D, kColumns)));
  return run(store_kernel<T, S, kWidth>, columns, kThreads, gpu, p, w);
}

}  // namespace

template <typename T, typename S>
int enqueue(const EnqueueParams<T, S>& p, const Gpu& gpu) {
  if (p.B == 0) return cudaSuccess;
  const bool wide = p.D % kWide == 0 && is_aligned<T, kWide>(p.z) && is_aligned<S, kWide>(p.bank);
  return wide ? enqueue_in<kWide>(p, gpu) : enqueue_in<1>(p, gpu);
}

#define XBN_INSTANTIATE(S, ...)                                     \
  template int enqueue(const EnqueueParams<float, S>&, const Gpu&); \
  template int enqueue(const EnqueueParams<double, S>&, const Gpu&);
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
