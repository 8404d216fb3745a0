// The pairs of memory_loss that the screen has left, exactly: their similarities, scores and gradient in float.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M], bank_ids [M] or null; mask [B, words], found [1] of the
//          screen. z in float32, bank in that or 16 bits; D <= 1024, rows of a multiple of 16 bytes and aligned to that
//   out    of every segment of the bank, slot and anchor the sums, [segments, slots, B], and the sum of weight * row,
//          [segments, slots, B, D]; state [B] of the anchors. Nothing if the screen has left too many; many [1]
//   math   as sweep.cu. Labels and ids are compared in full: a pair the screen has kept for its hash is dropped.
//   grid   a warp to an anchor, a segment and a slot. It lists the bits of the segment, looks at labels and ids of 32
//          listed rows at a time, and reads those that are left into registers: for the product, and while they are
//          there for the gradient. Some rows are on their way at once.
//   keeps  sums of D columns in registers, 16 a thread at D = 512; a list of 4 KB a warp, and the map, in shared memory
//   needs  any GPU; no spills
//   digits a pair in float, 32 of them in float, the rest in double; the gradient in float
//   order  rows in order, and then segments: the same bits every run on the same kind of GPU
#include "../vectors.cuh"
#include "screen.cuh"

namespace xbn::cuda {
namespace {

constexpr int kPairThreads = 128;  // few: a block takes as long as its anchor with most pairs
constexpr int kPairWarps = kPairThreads / kWarp;
constexpr int kList = 2048;         // rows
constexpr int kGroup = kWarp * 32;  // rows of a word in each lane
constexpr int kFarthest = 1 << 16;  // from the first of a list to its last

template <int kDim>
struct PairShape {
  static constexpr int kVectors = kDim / 128;                                          // of four columns, of a lane
  static constexpr int kFlight = kVectors == 4 ? 3 : kVectors > 4 ? 2 : 8 / kVectors;  // rows on their way
  static constexpr int kBlocks = kDim <= 256 ? 4 : kDim <= 512 ? 3 : 2;                // at once on a multiprocessor
};

template <int kDim>
struct PairMemory {
  alignas(16) float scale[kDim];
  alignas(16) float shift[kDim];
  uint16_t list[kPairWarps][kList];
};

// What a warp lists of an anchor's bits in a segment.
class Candidates {
 public:
  // Of so many rows from the first of `mask` on.
  __device__ __forceinline__ Candidates(const uint32_t* mask, int rows, uint16_t* list)
      : mask_(mask), rows_(rows), list_(list) {
    coming_ = word();
  }

  // The next rows, as many as the list holds: false if no row is left. By all lanes.
  __device__ __forceinline__ bool fill() {
    __syncwarp();  // all have read the list
    first_ = next_, size_ = 0;
    while (next_ < rows_ && size_ <= kList - kGroup && next_ - first_ <= kFarthest - kGroup) {
      uint32_t bits = coming_;
      const int from = next_ - first_ + 32 * lane();
      next_ += kGroup;
      coming_ = word();  // on its way while these are listed
      const int mine = __popc(bits);
      int place = mine;  // behind the bits of the lanes before
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, place, static_cast<unsigned>(step));
        if (lane() >= step) place += before;
      }
      const int all = __shfl_sync(0xffffffffu, place, kWarp - 1);
      uint16_t* to = list_ + size_ + place - mine;
      for (; bits != 0; bits &= bits - 1) *to++ = static_cast<uint16_t>(from + __ffs(static_cast<int>(bits)) - 1);
      size_ += all;
    }
    __syncwarp();
    return size_ > 0 || next_ < rows_;
  }

  __device__ __forceinline__ int size() const { return size_; }
  __device__ __forceinline__ int row(int k) const { return first_ + list_[k]; }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // This lane's of the next group; bits beyond the last row mean nothing.
  __device__ __forceinline__ uint32_t word() const {
    const int row = next_ + 32 * lane();
    if (row >= rows_) return 0;
    const uint32_t bits = mask_[row / 32];
    return rows_ - row >= 32 ? bits : bits & ((1u << (rows_ - row)) - 1u);
  }

  const uint32_t* mask_;
  int rows_, next_ = 0, first_ = 0, size_ = 0;
  uint16_t* list_;
  uint32_t coming_;
};

template <int kDim, typename S>
__global__ void __launch_bounds__(kPairThreads, PairShape<kDim>::kBlocks)
    pair_kernel(const MemoryLossParams<float, S> p, const Pass pass, const Screen screen, const double most,
                const PartialLoss<float> partial) {
  constexpr int kVectors = PairShape<kDim>::kVectors, kFlight = PairShape<kDim>::kFlight;
  __shared__ PairMemory<kDim> shared;
  const int64_t count = stored_rows(p.count, p.M);
  const bool few = static_cast<double>(*screen.found) <= most * static_cast<double>(p.B * count);
  if (blockIdx.x == 0 && threadIdx.x == 0) *screen.many = !few;
  if (!few) return;
  for (int d = threadIdx.x; d < kDim; d += kPairThreads) {
    shared.scale[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f;
    shared.shift[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *partial.ticket = 0;
  __syncthreads();

  // Neighbouring warps have neighbouring anchors and the same rows.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, D = static_cast<int>(p.D);
  const int task = static_cast<int>(blockIdx.x) * kPairWarps + warp, B = static_cast<int>(p.B);
  const int slots = static_cast<int>(partial.slots), slice = task / B, i = task % B, segment = slice / slots;
  if (segment >= partial.shortcut.splits) return;
  const Slot& slot = slice % slots == 0 ? pass.slot[0] : pass.slot[1];
  const MarginFormula<float> formula = {static_cast<float>(slot.a), static_cast<float>(slot.b)};
  const Pairs pairs = slot.pairs;

  float4 z[kVectors], sum[kVectors];
  bool finite = true;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int d = 128 * v + 4 * lane;
    z[v] = d < D ? *reinterpret_cast<const float4*>(p.z + static_cast<int64_t>(i) * D + d) : zeros4();
    sum[v] = zeros4();
    finite = finite && is_finite(z[v].x) && is_finite(z[v].y) && is_finite(z[v].z) && is_finite(z[v].w);
  }
  finite = __all_sync(0xffffffffu, finite);
  const bool ranks = is_marked(p.anchors, i);
  const uint8_t state = static_cast<uint8_t>((ranks ? kRanks : 0) | (finite ? kFinite : 0));
  if (slice == 0 && lane == 0) partial.state[i] = state;
  const Anchor<float> anchor = {p.labels[i], excluded_id(p, i), 0, state};

  const int64_t words = ceil_div(ceil_div(count, 32), partial.shortcut.splits);
  const int64_t first = smaller(segment * words * 32, count);
  const int rows = static_cast<int>(smaller(words * 32, count - first));
  const S* bank = p.bank + first * p.D + 4 * lane;
  double value = 0;
  int weights = 0, counted = 0;  // a weight is 1 or -1
  Candidates candidates(screen.mask + static_cast<int64_t>(i) * screen.words(p.M) + first / 32, rows,
                        shared.list[warp]);
  while (candidates.fill())
    for (int begin = 0; begin < candidates.size(); begin += kWarp) {
      const bool listed = begin + lane < candidates.size();
      const int row = listed ? candidates.row(begin + lane) : 0;
      const bool positive = listed && p.bank_labels[first + row] == anchor.label;
      const bool on = listed && anchor.pairs_with(row_id(p.bank_ids, first + row), positive, pairs);
      const unsigned positives = __ballot_sync(0xffffffffu, positive);
      unsigned left = __ballot_sync(0xffffffffu, on);
      if (!finite) {  // each similarity is NaN: no row need be read
        const Score<float> score = formula(static_cast<float>(NAN), false, 0.0f);
        const int n = __popc(left), n_positive = __popc(left & positives);
        value += n > 0 ? score.value : 0.0f, weights += n - 2 * n_positive, counted += n;
        continue;
      }
      float of_32 = 0;
      while (left != 0) {
        float4 r[kFlight][kVectors];
        bool is_positive[kFlight], exists[kFlight];
#pragma unroll
        for (int q = 0; q < kFlight; ++q) {
          exists[q] = left != 0;
          const int source = exists[q] ? __ffs(static_cast<int>(left)) - 1 : 0;
          left &= left - 1;
          is_positive[q] = positives >> source & 1u;
          const S* at = bank + static_cast<int64_t>(__shfl_sync(0xffffffffu, row, source)) * D;
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            r[q][v] = exists[q] && 128 * v + 4 * lane < D ? four_at(at + 128 * v) : zeros4();
        }
        float dot[kFlight] = {}, square[kFlight] = {};
#pragma unroll
        for (int q = 0; q < kFlight; ++q)
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            r[q][v] = affine4(shared.scale, shared.shift, 128 * v + 4 * lane, r[q][v]);
            dot[q] = dot4(z[v], r[q][v], dot[q]);
            square[q] = dot4(r[q][v], r[q][v], square[q]);
          }
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2)
#pragma unroll
          for (int q = 0; q < kFlight; ++q) {
            dot[q] += __shfl_xor_sync(0xffffffffu, dot[q], step);
            square[q] += __shfl_xor_sync(0xffffffffu, square[q], step);
          }
#pragma unroll
        for (int q = 0; q < kFlight; ++q) {
          const float norm = sqrtf(square[q]), eps = static_cast<float>(p.eps);
          const float inverse = p.renormalize ? inverse_length(norm, eps) : 1.0f;
          const Score<float> score = formula(dot[q] * inverse, is_positive[q], 0.0f);
          if (!exists[q] || !score.counts) continue;
          of_32 += score.value, weights += score.weight > 0 ? 1 : -1, counted += 1;
          const float factor = score.weight * inverse;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) sum[v] = add4(factor, r[q][v], sum[v]);
        }
      }
      value += of_32;
    }

  const int64_t at = static_cast<int64_t>(slice) * B + i;
  if (lane == 0) partial.sums[at] = {value, static_cast<double>(weights), static_cast<double>(counted), 0};
  if (partial.grad == nullptr) return;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int d = 128 * v + 4 * lane;
    if (d < D) *reinterpret_cast<float4*>(partial.grad + at * p.D + d) = sum[v];
  }
}

}  // namespace

template <typename S>
int launch_pairs(const MemoryLossParams<float, S>& p, const Pass& pass, const Screen& screen, double most,
                 const PartialLoss<float>& partial, const Gpu& gpu) {
  const int64_t segments = partial.shortcut.splits, tasks = segments * partial.slots * p.B;
  const dim3 grid(static_cast<unsigned>(ceil_div(tasks, kPairWarps)));
  const auto with = [&](auto kernel) { return run(kernel, grid, kPairThreads, gpu, p, pass, screen, most, partial); };
  if (p.D <= 128) return with(pair_kernel<128, S>);
  if (p.D <= 256) return with(pair_kernel<256, S>);
  if (p.D <= 512) return with(pair_kernel<512, S>);
  return with(pair_kernel<1024, S>);
}

#define XBN_INSTANTIATE(S, ...)                                                                    \
  template int launch_pairs(const MemoryLossParams<float, S>&, const Pass&, const Screen&, double, \
                            const PartialLoss<float>&, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
