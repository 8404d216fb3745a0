// The gradient of halves.cu: weights of a chunk of the bank times its rows, to the digits of float, from products in fp16.
//
//   in     weights [slots * B, chunk] of bank rows [first, first + chunk), already divided by the rows' norms, of every
//          split the largest; which 32 rows have one; bank [M, D] in float32 or 16 bits, rows [0, count) count; D <= 1024,
//          rows of a multiple of 16 bytes and aligned to that
//   out    grad [splits, slots, B, D] += sum of weight * r_j over the split's part of the chunk; of a first chunk, =.
//          What chunks before have added is multiplied by rescale [splits, kSlots, B]
//   math   r_j = scale * u_j + shift
//   digits weights times a power of two that brings the split's largest to [2^14, 2^15), rows times 256; then as in
//          similarities.cu, 32 rows by the tensor cores, the rest in float
//   grid   splits x (256 columns, 128 of as many) x (64 anchors and a slot). A warp takes 32 columns and, 32 at a time,
//          the rows of its part that have a weight: straight from memory to the product's operands, the next ones on
//          their way meanwhile. Their weights pass through shared memory, where they become operands
//   keeps  in registers sums of 64 anchors x 32 columns a warp, 64 a thread; in shared memory 16 KB of weights
//   needs  compute capability 8.0; no spills
//   order  rows of a part in order, chunks in order: the same bits every run on the same kind of GPU
#include "../vectors.cuh"
#include "halves.cuh"
#include "mma.cuh"

namespace xbn::cuda {
namespace {

constexpr int kWeighedAnchors = 64, kWeighedBands = kWeighedAnchors / 16;
constexpr int kSet = 32;                           // rows at a time
constexpr int kMostSets = kMostRowsOfPart / kSet;  //
constexpr int kGroups = kWeighedAnchors / ChunkScores<float>::kGroup;
static_assert(kGroups == 16);  // bytes of `some`, read at once

constexpr int warps_of(int64_t D) { return D <= 128 ? 4 : 8; }
__host__ __device__ constexpr int threads_of(int warps) { return warps * kWarp; }

struct WeightedMemory {
  uint4 high[2][kWeighedBands][2][kWarp];  // [set in turn][band][sixteen rows][lane]
  uint4 low[2][kWeighedBands][2][kWarp];
  float times[kWeighedAnchors], back[kWeighedAnchors];
  int sets;
  uint16_t list[kMostSets];  // those with a weight
};

// Whether one of the first `groups` bytes is not 0.
__device__ __forceinline__ bool has_some(const uint4& bytes, int64_t groups) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t some = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t left = groups - 4 * k;
    if (left > 0) some |= left >= 4 ? words[k] : words[k] & ((1u << 8 * left) - 1u);
  }
  return some != 0;
}

// The weights of a set on their way from memory: a thread brings those of one lane's operand, or of two. Where these
// are is computed each time again: it takes no registers in between.
template <int kWarps>
class ComingWeights {
 public:
  // Of the block's anchors, so far from each other, and 32 rows from `row` on; -1: none.
  __device__ __forceinline__ void load(const float* weights, int stride, int anchors, int row) {
    const Place place;
#pragma unroll
    for (int q = 0; q < kOperands; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int a = 16 * place.band(q) + place.g + e % 2 * 8;
        const int j = row + 16 * place.sixteen(q) + 2 * place.t + e / 2 * 8;
        const bool has = row >= 0 && a < anchors;
        two_[q][e] = has ? *reinterpret_cast<const float2*>(weights + a * stride + j) : make_float2(0, 0);
      }
  }

  __device__ __forceinline__ void store(WeightedMemory& shared, int turn) const {
    const Place place;
#pragma unroll
    for (int q = 0; q < kOperands; ++q) {
      const int band = place.band(q), sixteen = place.sixteen(q);
      const float upper = shared.times[16 * band + place.g], lower = shared.times[16 * band + place.g + 8];
      const Halves x(upper * two_[q][0].x, upper * two_[q][0].y), y(lower * two_[q][1].x, lower * two_[q][1].y);
      const Halves z(upper * two_[q][2].x, upper * two_[q][2].y), w(lower * two_[q][3].x, lower * two_[q][3].y);
      shared.high[turn][band][sixteen][place.lane] = make_uint4(x.high, y.high, z.high, w.high);
      shared.low[turn][band][sixteen][place.lane] = make_uint4(x.low, y.low, z.low, w.low);
    }
  }

 private:
  static constexpr int kOperands = kWeighedBands * 2 / kWarps;

  struct Place {
    int warp, lane, g, t;

    __device__ __forceinline__ Place() {
      const int thread = hidden(static_cast<int>(threadIdx.x));
      warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
    }
    __device__ __forceinline__ int band(int q) const { return (warp + q * kWarps) / 2; }
    __device__ __forceinline__ int sixteen(int q) const { return (warp + q * kWarps) % 2; }
  };

  float2 two_[kOperands][4];  // rows 2 t, 2 t + 1 of anchors g, g + 8; rows 2 t + 8, 2 t + 9 of these
};

// What the map makes of four columns of a row.
struct ColumnMap {
  float4 scale, shift;  // both times kRowTimes

  __device__ __forceinline__ ColumnMap(const RankParams<float>& p, int column) : scale(zeros4()), shift(zeros4()) {
    if (column >= p.D) return;
    const auto of = [&](const double* map, int c, float without) {
      return kRowTimes * (map != nullptr ? static_cast<float>(map[column + c]) : without);
    };
    scale = make_float4(of(p.scale, 0, 1), of(p.scale, 1, 1), of(p.scale, 2, 1), of(p.scale, 3, 1));
    shift = make_float4(of(p.shift, 0, 0), of(p.shift, 1, 0), of(p.shift, 2, 0), of(p.shift, 3, 0));
  }

  template <typename S>
  __device__ __forceinline__ float4 operator()(const Vector<S, 4>& stored) const {
    const float4 u = four_of(stored, 0);
    return make_float4(fmaf(scale.x, u.x, shift.x), fmaf(scale.y, u.y, shift.y), fmaf(scale.z, u.z, shift.z),
                       fmaf(scale.w, u.w, shift.w));
  }
};

template <int kWarps, typename S>
__global__ void __launch_bounds__(threads_of(kWarps), 8 / kWarps)
    weighted_rows_kernel(const MemoryLossParams<float, S> p, const Pass pass, const PartialLoss<float> partial,
                         const ChunkScores<float> chunk) {
  constexpr int kBands = kWeighedBands, kThreads = threads_of(kWarps);
  if constexpr (!kHasTensorCores) return;
  __shared__ WeightedMemory shared;
  if (!partial.shortcut.is_taken()) return;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
  const int blocks = static_cast<int>((p.B + kWeighedAnchors - 1) / kWeighedAnchors);
  const int slot = pass.weighs(0) ? static_cast<int>(blockIdx.z) / blocks : 1;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.z % blocks) * kWeighedAnchors;
  const int64_t split = blockIdx.x, begin = split * chunk.part;
  const int count = static_cast<int>(
      smaller(smaller(chunk.part, chunk.chunk - begin), stored_rows(p.count, p.M) - chunk.first - begin));
  const int64_t at = (split * kSlots + slot) * p.B + first_anchor;  // in [splits, kSlots, B]

  if (warp == 0) {
    const int64_t row_of_some = chunk.row_of_some(p.B);
    const uint8_t* some =
        chunk.some + (slot * chunk.chunk + begin) / kSet * row_of_some + first_anchor / ChunkScores<float>::kGroup;
    const int64_t groups = ceil_div(p.B - first_anchor, ChunkScores<float>::kGroup);
    const int sets = (count + kSet - 1) / kSet;
    int listed = 0;
    for (int from = 0; from < sets; from += kWarp) {
      const int set = from + lane;
      const bool has = set < sets && has_some(*reinterpret_cast<const uint4*>(some + set * row_of_some), groups);
      const unsigned having = __ballot_sync(0xffffffffu, has);
      if (has) shared.list[listed + __popc(having & ((1u << lane) - 1u))] = static_cast<uint16_t>(set);
      listed += __popc(having);
    }
    if (lane == 0) shared.sets = listed;
  }
  for (int a = thread; a < kWeighedAnchors; a += kThreads) {
    const PowerOfTwo power(first_anchor + a < p.B ? chunk.largest[at + a] : 0.0f);
    shared.times[a] = power.times;
    shared.back[a] = power.back / kRowTimes;
  }
  __syncthreads();

  const int D = static_cast<int>(p.D), column = (static_cast<int>(blockIdx.y) * kWarps + warp) * 32 + 4 * g;
  const bool has_column = column < D;
  const ColumnMap map(p, column);

  // Of the listed set n: this lane's columns of rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of its k-th sixteen.
  const S* const bank = p.bank + (chunk.first + begin) * p.D + column;
  const auto load = [&](int n, int k, Vector<S, 4>(&rows)[4]) {
    const int from = n < shared.sets ? shared.list[n] * kSet + 16 * k + 2 * t : count;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int j = from + e % 2 + e / 2 * 8;
      rows[e] = has_column && j < count ? stored_four_at(bank + j * D) : Vector<S, 4>{};
    }
  };

  const float* const weights = chunk.s + (slot * p.B + first_anchor) * chunk.chunk + begin;
  const int stride = static_cast<int>(chunk.chunk);
  const int anchors = static_cast<int>(smaller(p.B - first_anchor, kWeighedAnchors));
  const auto load_weights = [&](int n, ComingWeights<kWarps>& to) {
    to.load(weights, stride, anchors, n < shared.sets ? shared.list[n] * kSet : -1);
  };

  float sum[kBands][4][4] = {};  // columns 4 (2 t + c) + n of anchors 16 band + 8 half + g at [band][n][2 half + c]
  Vector<S, 4> rows[2][4];
#pragma unroll
  for (int k = 0; k < 2; ++k) load(0, k, rows[k]);
  ComingWeights<kWarps> coming;
  load_weights(0, coming);
  coming.store(shared, 0);
  load_weights(1, coming);
  __syncthreads();
#pragma unroll 1
  for (int n = 0; n < shared.sets; ++n) {
    if (n + 1 < shared.sets) coming.store(shared, (n + 1) % 2);
    load_weights(n + 2, coming);
    float part[kBands][4][4] = {};  // of this set
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float4 r[4] = {map(rows[k][0]), map(rows[k][1]), map(rows[k][2]), map(rows[k][3])};
      load(n + 1, k, rows[k]);
      uint2 high[4], low[4];
      const auto operand = [&](int c, float x, float y, float z, float w) {
        const Halves upper(x, y), lower(z, w);
        high[c] = make_uint2(upper.high, lower.high), low[c] = make_uint2(upper.low, lower.low);
      };
      operand(0, r[0].x, r[1].x, r[2].x, r[3].x);
      operand(1, r[0].y, r[1].y, r[2].y, r[3].y);
      operand(2, r[0].z, r[1].z, r[2].z, r[3].z);
      operand(3, r[0].w, r[1].w, r[2].w, r[3].w);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        const uint4 high_w = shared.high[n % 2][band][k][lane], low_w = shared.low[n % 2][band][k][lane];
#pragma unroll
        for (int c = 0; c < 4; ++c) multiply_add_halves(part[band][c], high_w, low_w, high[c], low[c]);
      }
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[band][c][e] += part[band][c][e];
    __syncthreads();
  }

  const bool exponents = is_exponential(slot == 0 ? pass.slot[0].formula : pass.slot[1].formula);
#pragma unroll
  for (int band = 0; band < kBands; ++band)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int a = 16 * band + g + e / 2 * 8, d = column - 4 * g + 4 * (2 * t + e % 2);
      if (first_anchor + a >= p.B || d >= D) continue;
      float* const grad = partial.grad + ((split * partial.slots + slot) * p.B + first_anchor + a) * p.D + d;
      const float back = shared.back[a];
      float4 all =
          make_float4(back * sum[band][0][e], back * sum[band][1][e], back * sum[band][2][e], back * sum[band][3][e]);
      if (chunk.first > 0) all = add4(exponents ? chunk.rescale[at + a] : 1.0f, four_at(grad), all);
      store4(grad, all);
    }
}

template <int kWarps, typename S>
int launch_of(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
              const ChunkScores<float>& chunk, const Gpu& gpu) {
  const int64_t slots = pass.weighs(0) + pass.weighs(1);
  const dim3 grid(static_cast<unsigned>(ceil_div(chunk.chunk, chunk.part)),
                  static_cast<unsigned>(ceil_div(p.D, kWarps * 32)),
                  static_cast<unsigned>(ceil_div(p.B, kWeighedAnchors) * slots));
  return run(weighted_rows_kernel<kWarps, S>, grid, threads_of(kWarps), gpu, p, pass, partial, chunk);
}

}  // namespace

Parts plan_parts(int64_t B, int64_t D, int64_t chunk, int multiprocessors) {
  constexpr int64_t kLeastRows = 256;
  const int64_t warps = warps_of(D), at_once = multiprocessors * (8 / warps);
  const int64_t others = ceil_div(B, kWeighedAnchors) * ceil_div(D, warps * 32);
  const int64_t wanted = larger(1, smaller(at_once / others, ceil_div(chunk, kLeastRows)));
  const int64_t rows = round_up(ceil_div(chunk, larger(wanted, ceil_div(chunk, kMostRowsOfPart))), kSet);
  return {rows, ceil_div(chunk, rows)};
}

template <typename S>
int launch_weighted_rows(const MemoryLossParams<float, S>& p, const Pass& pass, const PartialLoss<float>& partial,
                         const ChunkScores<float>& chunk, const Gpu& gpu) {
  return warps_of(p.D) == 4 ? launch_of<4>(p, pass, partial, chunk, gpu) : launch_of<8>(p, pass, partial, chunk, gpu);
}

#define XBN_INSTANTIATE(S, ...)                                                                                \
  template int launch_weighted_rows(const MemoryLossParams<float, S>&, const Pass&, const PartialLoss<float>&, \
                                    const ChunkScores<float>&, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
