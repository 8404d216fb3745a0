// memory_loss of all triplets, in the composite way: the kernels around the two products.
//
//   in     similarities s [B, chunk] of a chunk of the bank; labels, exclude, state of the anchors
//   out    sums [B] of the negatives, weights [B, chunk] of the negatives, then of the positives
//   math   ranks.h. The sum over an anchor's triplets is sum_n k_n x_n - sum_r above_r t_r, both in double
//   grid   a block to an anchor; round_kernel: a warp to an anchor
//   keeps  at most `most` thresholds of an anchor. The host cannot know how many there are, so there are as many rounds
//          as the bank could need, each for the next `most` rows of an anchor's label
//   needs  the products to give a pair the same similarity in every pass of a round; a threshold that is not found is
//          taken for the next one
//   order  thresholds are collected in any order and then sorted, ranks are counted in integers, sums are added up in a
//          fixed order: the same bits every run, as far as the library's products are
#include "triplets.cuh"

#include "../../math/ranks.h"
#include "chunk.cuh"

namespace xbn::cuda {
namespace {

// To where a scan of bank labels from `from` on has met `most` rows with this label, by a full warp.
__device__ int64_t end_of_round(const int64_t* labels, int64_t label, int64_t from, int64_t stored, int64_t most) {
  const int lane = threadIdx.x % kWarp;
  while (from < stored) {
    const bool mine = from + lane < stored && labels[from + lane] == label;
    for (unsigned left = __ballot_sync(0xffffffffu, mine); left != 0; left &= left - 1)
      if (--most == 0) {
        while (!(left & 1u)) left >>= 1, ++from;
        return from + 1;
      }
    from += kWarp;
  }
  return stored;
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    round_kernel(const MemoryLossParams<T, T> p, const Thresholds<T> t, int64_t round, int64_t rounds) {
  const int64_t i = blockIdx.x * kBlockWarps + threadIdx.x / kWarp;
  if (i >= p.B) return;
  const int64_t stored = stored_rows(p.count, p.M), from = round == 0 ? 0 : t.to[i];
  const int64_t to = rounds == 1 ? stored : end_of_round(p.bank_labels, p.labels[i], from, stored, t.most);
  __syncwarp();  // all lanes have read t.to
  if (threadIdx.x % kWarp != 0) return;
  t.collected[i] = 0;
  t.from[i] = from;
  t.to[i] = to;
}

// Four blocks on a multiprocessor are asked for: left to itself the compiler spills to fit more in.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 4)
    collect_kernel(const MemoryLossParams<T, T> p, const PartialLoss<T> partial, const Thresholds<T> t, int64_t first,
                   int64_t chunk, const T* s) {
  const ChunkPairs<T, 1> block(p, partial, first, chunk, s);
  const int64_t from = t.from[block.first_anchor], to = t.to[block.first_anchor];
  for (int64_t j = threadIdx.x; j < block.rows; j += kBlockThreads)
    if (first + j >= from && first + j < to && has_pair(block, j, Pairs::positives))
      t.similarity[block.first_anchor * t.most + atomicAdd(t.collected + block.first_anchor, 1u)] =
          block.similarity(0, j);
}

// Bitonic, in place. Every comparison puts the lesser at the lower index, so what is beyond the end may be thought of
// as infinite, and is never looked at.
template <typename T>
__device__ void sort(T* values, int64_t n) {
  for (int64_t size = 2; size < 2 * n; size *= 2)
    for (int64_t stride = size / 2; stride > 0; stride /= 2) {
      for (int64_t k = threadIdx.x; 2 * k < size * ceil_div(n, size); k += kBlockThreads) {
        const int64_t low = 2 * stride * (k / stride) + k % stride;
        const int64_t high = stride == size / 2 ? low / size * size + size - 1 - low % size : low + stride;
        if (high >= n || !sorts_before(values[high], values[low])) continue;
        const T value = values[low];
        values[low] = values[high];
        values[high] = value;
      }
      __syncthreads();
    }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads) sort_kernel(const Thresholds<T> t) {
  const int64_t i = blockIdx.x, n = t.collected[i];
  for (int64_t r = threadIdx.x; r <= n; r += kBlockThreads) t.above[i * (t.most + 1) + r] = 0;
  sort(t.similarity + i * t.most, n);
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    rank_kernel(const MemoryLossParams<T, T> p, const PartialLoss<T> partial, const Thresholds<T> t, const Slot slot,
                int64_t first, int64_t chunk, T* s) {
  const ChunkPairs<T, 1> block(p, partial, first, chunk, s);
  const int64_t i = block.first_anchor, n = t.collected[i];
  const T* thresholds = t.similarity + i * t.most;
  unsigned* above = t.above + i * (t.most + 1);
  double value = 0;
  int64_t triplets = 0, above_all = 0;
  for (int64_t j = threadIdx.x; j < chunk; j += kBlockThreads) {
    int64_t k = 0;
    if (n > 0 && has_pair(block, j, slot.pairs)) {
      const T x = block.similarity(0, j) + static_cast<T>(slot.a);
      k = rank_among(thresholds, n, x);
      if (k > 0) value += static_cast<double>(k) * static_cast<double>(x);
      if (k > 0 && k < n) atomicAdd(above + k, 1u);
      triplets += k;
      above_all += k == n;
    }
    s[i * chunk + j] = static_cast<T>(k);
  }
  if (n == 0) return;
  const BlockSums<kBlockThreads, 3> sums({value, static_cast<double>(triplets), static_cast<double>(above_all)});
  if (threadIdx.x != 0) return;
  above[n] += static_cast<unsigned>(sums[2]);
  partial.sums[i] = add(slot.formula, partial.sums[i], {sums[0], 0, sums[1], 0});
}

// Negatives of every rank become negatives above every threshold; what the thresholds cost goes off the sum. Of both
// kinds, `weight` is how many are in a triplet that costs something; the round of the lowest threshold has all such
// negatives.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    settle_ranks_kernel(const PartialLoss<T> partial, const Thresholds<T> t) {
  __shared__ unsigned totals[kBlockThreads];
  const int64_t i = blockIdx.x, n = t.collected[i];
  if (n == 0) return;
  const int64_t part = ceil_div(n, kBlockThreads), parts = ceil_div(n, part);
  const int64_t begin = smaller(threadIdx.x * part, n), end = smaller(begin + part, n);
  unsigned* above = t.above + i * (t.most + 1);
  unsigned total = 0, of_next = above[end];
  for (int64_t r = begin; r < end; ++r) total += above[r + 1];
  totals[threadIdx.x] = total;
  __syncthreads();
  unsigned higher = 0;
  if (begin < end)
    for (int64_t other = threadIdx.x + 1; other < parts; ++other) higher += totals[other];
  double cost = 0, positives = 0;
  for (int64_t r = end - 1; r >= begin; --r) {
    higher += of_next;
    of_next = above[r];
    above[r] = higher;
    positives += higher > 0;
    if (higher > 0) cost += static_cast<double>(higher) * static_cast<double>(t.similarity[i * t.most + r]);
  }
  const BlockSums<kBlockThreads, 2> sums({cost, positives});
  if (threadIdx.x != 0) return;
  partial.sums[i].value -= sums[0];
  partial.sums[i].weight = std::fmax(partial.sums[i].weight, static_cast<double>(higher));  // thread 0 has the lowest
  partial.sums[gridDim.x + i].weight += sums[1];
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    weigh_kernel(const MemoryLossParams<T, T> p, const PartialLoss<T> partial, const Thresholds<T> t, int64_t first,
                 int64_t chunk, const T* s, T* weights) {
  const ChunkPairs<T, 1> block(p, partial, first, chunk, s);
  const int64_t i = block.first_anchor, n = t.collected[i], from = t.from[i], to = t.to[i];
  for (int64_t j = threadIdx.x; j < chunk; j += kBlockThreads) {
    T weight = 0;
    if (n > 0 && first + j >= from && first + j < to && has_pair(block, j, Pairs::positives))
      weight =
          static_cast<T>(t.above[i * (t.most + 1) + place_among(t.similarity + i * t.most, n, block.similarity(0, j))]);
    weights[i * chunk + j] = weight;
  }
}

dim3 one_block_each(int64_t anchors) { return dim3(static_cast<unsigned>(anchors)); }

}  // namespace

template <typename T>
int launch_triplets_begin(const MemoryLossParams<T, T>& p, int64_t round, int64_t rounds, const Thresholds<T>& t,
                          const Gpu& gpu) {
  return run(round_kernel<T>, one_block_each(ceil_div(p.B, kBlockWarps)), kBlockThreads, gpu, p, t, round, rounds);
}

template <typename T>
int launch_triplets_score(const MemoryLossParams<T, T>& p, const Pass& pass, const PartialLoss<T>& partial,
                          const Thresholds<T>& t, int64_t first, int64_t chunk, T* s, const Gpu& gpu) {
  const dim3 grid = one_block_each(p.B);
  if (pass.slot[0].formula == Formula::rank)
    return run(rank_kernel<T>, grid, kBlockThreads, gpu, p, partial, t, pass.slot[0], first, chunk, s);
  if (pass.slot[1].formula == Formula::threshold)
    return run(collect_kernel<T>, grid, kBlockThreads, gpu, p, partial, t, first, chunk, s);
  return run(weigh_kernel<T>, grid, kBlockThreads, gpu, p, partial, t, first, chunk, s, s + p.B * chunk);
}

template <typename T>
int launch_triplets_end(const MemoryLossParams<T, T>& p, const Pass& pass, const PartialLoss<T>& partial,
                        const Thresholds<T>& t, const Gpu& gpu) {
  const dim3 grid = one_block_each(p.B);
  if (pass.slot[1].formula == Formula::threshold) return run(sort_kernel<T>, grid, kBlockThreads, gpu, t);
  if (pass.slot[0].formula == Formula::rank) return run(settle_ranks_kernel<T>, grid, kBlockThreads, gpu, partial, t);
  return cudaSuccess;
}

#define XBN_INSTANTIATE(T)                                                                                  \
  template int launch_triplets_begin(const MemoryLossParams<T, T>&, int64_t, int64_t, const Thresholds<T>&, \
                                     const Gpu&);                                                           \
  template int launch_triplets_score(const MemoryLossParams<T, T>&, const Pass&, const PartialLoss<T>&,     \
                                     const Thresholds<T>&, int64_t, int64_t, T*, const Gpu&);               \
  template int launch_triplets_end(const MemoryLossParams<T, T>&, const Pass&, const PartialLoss<T>&,       \
                                   const Thresholds<T>&, const Gpu&);
XBN_INSTANTIATE(float)
XBN_INSTANTIATE(double)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
