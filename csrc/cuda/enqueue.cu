// enqueue_: the rows of z that are in the mask and finite enter the ring, the oldest rows leave.
//
//   in       z [B, D], labels [B], mask and ids [B] or null, step [1]; scale, shift [D] of the pending map
//   in, out  bank [M, D], bank_labels [M], bank_ids and bank_steps [M] or null, sums [2, D], head [1], count [1]
//   out      slots [B]: where each row went, -1 where it was not stored
//   math     stored as u = (z - shift) / scale, rounded to the bank's dtype. A row whose u is not finite is left out.
//            More rows than the ring holds: the last M of them stay.
//   grid     assign_kernel: a warp to a row, to find the rows that can be stored; the block that finishes last gives
//            out the slots and moves the ring on. store_kernel: a block to 32 columns, 8 threads deep; writes the rows
//            and, in the same launch, moves the sums by what enters and what leaves.
//   keeps    a flag per row in the workspace
//   needs    any GPU; columns beside each other go to threads beside each other, one element at a time
//   order    fixed: each of the 8 threads of a column takes every eighth row, their sums are added in order
#include "device.cuh"

namespace xbn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // per multiprocessor at least: left to itself the compiler spills to fit more in
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 64;
constexpr int kColumns = 32;
constexpr int kLanes = kThreads / kColumns;
constexpr int kBatch = 4;  // rows of a thread in flight

struct Workspace {
  unsigned* ticket;   // [1]
  int64_t* filled;    // [1] stored rows before this call
  uint8_t* storable;  // [B]
  int64_t bytes;

  Workspace(void* memory, int64_t B) {
    Carver carve(memory);
    ticket = carve.take<unsigned>(1);
    filled = carve.take<int64_t>(1);
    storable = carve.take<uint8_t>(B);
    bytes = carve.bytes();
  }
};

template <typename T, typename S>
__device__ __forceinline__ S pull_back(const EnqueueParams<T, S>& p, int64_t i, int64_t d) {
  using C = typename Compute<S>::type;
  return static_cast<S>(static_cast<C>((static_cast<double>(p.z[i * p.D + d]) - p.shift[d]) / p.scale[d]));
}

// Sum of the values of the threads before this one; *total: of all.
__device__ int64_t exclusive_sum(int64_t value, int64_t* total) {
  __shared__ int64_t prefix[kThreads];
  prefix[threadIdx.x] = value;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const int64_t left = static_cast<int>(threadIdx.x) >= step ? prefix[threadIdx.x - step] : 0;
    __syncthreads();
    prefix[threadIdx.x] += left;
  }
  __syncthreads();
  *total = prefix[kThreads - 1];
  return prefix[threadIdx.x] - value;
}

// One block: slots in the order of the rows, what goes with a row, and the counters.
template <typename T, typename S>
__device__ void assign_slots(const EnqueueParams<T, S>& p, const Workspace& w) {
  const int64_t run = ceil_div(p.B, kThreads);
  const int64_t begin = threadIdx.x * run, end = smaller(begin + run, p.B);
  int64_t mine = 0, stored = 0;
  for (int64_t i = begin; i < end; ++i) mine += __ldcg(w.storable + i);
  int64_t k = exclusive_sum(mine, &stored);

  const int64_t filled = stored_rows(p.count, p.M);
  const int64_t head = *p.head >= 0 && *p.head < p.M ? *p.head : 0;  // a damaged counter must not become a wild write
  const int64_t surplus = larger(0, stored - p.M);                   // the first of them would be overwritten at once
  for (int64_t i = begin; i < end; ++i) {
    p.slots[i] = -1;
    if (!__ldcg(w.storable + i)) continue;
    const int64_t place = k++ - surplus;
    if (place < 0) continue;
    const int64_t slot = head + place < p.M ? head + place : head + place - p.M;
    p.slots[i] = slot;
    p.bank_labels[slot] = p.labels[i];
    if (p.bank_ids != nullptr) p.bank_ids[slot] = stored_id(p.ids, i, slot);
    if (p.bank_steps != nullptr) p.bank_steps[slot] = *p.step;
  }
  __syncthreads();  // every thread has read the counters
  if (threadIdx.x != 0) return;
  const int64_t entered = stored - surplus;
  *w.filled = filled;
  *p.head = head + entered < p.M ? head + entered : head + entered - p.M;
  *p.count = smaller(filled + entered, p.M);
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) assign_kernel(const EnqueueParams<T, S> p, const Workspace w) {
  __shared__ bool last;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = blockIdx.x * kWarps + threadIdx.x / kWarp; i < p.B; i += gridDim.x * kWarps) {
    bool finite = true;
    for (int64_t d = lane; d < p.D; d += kWarp) finite &= is_finite(as<typename Compute<S>::type>(pull_back(p, i, d)));
    finite = __all_sync(0xffffffffu, finite);
    if (lane == 0) w.storable[i] = finite && (p.mask == nullptr || p.mask[i]);
  }
  if (is_last_block(w.ticket, gridDim.x, &last)) assign_slots(p, w);
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) store_kernel(const EnqueueParams<T, S> p, const Workspace w) {
  __shared__ double partial[2][kLanes][kColumns];
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kColumns + column, filled = *w.filled;
  double sum = 0, sum_squares = 0;
  if (d < p.D) {
    // Rows are read some at a time: a store could be to any of them, so the compiler moves no load across it.
    for (int64_t i = lane; i < p.B; i += kBatch * kLanes) {
      int64_t slot[kBatch];
      S in[kBatch], out[kBatch];
#pragma unroll
      for (int q = 0; q < kBatch; ++q) slot[q] = i + q * kLanes < p.B ? p.slots[i + q * kLanes] : -1;
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        if (slot[q] < 0) continue;
        in[q] = pull_back(p, i + q * kLanes, d);
        out[q] = slot[q] < filled ? p.bank[slot[q] * p.D + d] : static_cast<S>(0.0f);
      }
#pragma unroll
      for (int q = 0; q < kBatch; ++q) {
        if (slot[q] < 0) continue;
        const double entering = as<double>(in[q]), leaving = as<double>(out[q]);
        sum += entering - leaving;
        sum_squares += entering * entering - leaving * leaving;
        p.bank[slot[q] * p.D + d] = in[q];
      }
    }
  }
  partial[0][lane][column] = sum;
  partial[1][lane][column] = sum_squares;
  __syncthreads();
  if (lane != 0 || d >= p.D) return;
  for (int k = 1; k < kLanes; ++k) {
    sum += partial[0][k][column];
    sum_squares += partial[1][k][column];
  }
  p.sums[d] += sum;
  p.sums[p.D + d] += sum_squares;
}

}  // namespace

int64_t enqueue_workspace(int64_t B) { return Workspace(nullptr, B).bytes; }

template <typename T, typename S>
int launch_enqueue(const EnqueueParams<T, S>& p, const Launch& launch) {
  if (p.B == 0) return cudaSuccess;
  const Workspace w(launch.workspace, p.B);
  int error = cudaMemsetAsync(w.ticket, 0, sizeof(unsigned), static_cast<cudaStream_t>(launch.stream));
  if (error != cudaSuccess) return error;
  const dim3 rows(static_cast<unsigned>(smaller(ceil_div(p.B, kWarps), kMaxBlocks)));
  error = run(assign_kernel<T, S>, rows, kThreads, launch, p, w);
  if (error != cudaSuccess) return error;
  return run(store_kernel<T, S>, dim3(static_cast<unsigned>(ceil_div(p.D, kColumns))), kThreads, launch, p, w);
}

#define XBN_INSTANTIATE(S)                                                    \
  template int launch_enqueue(const EnqueueParams<float, S>&, const Launch&); \
  template int launch_enqueue(const EnqueueParams<double, S>&, const Launch&);
XBN_INSTANTIATE(float)
XBN_INSTANTIATE(double)
XBN_INSTANTIATE(Float16)
XBN_INSTANTIATE(BFloat16)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
