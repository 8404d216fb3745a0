// Similarities of the anchors with a chunk of the bank, to the digits of float, from products in fp16.
//
//   in     z [B, D]; bank [M, D], of it rows [first, first + chunk); rows [0, count) count; z in float32, bank in that
//          or 16 bits; D <= 1024, rows of a multiple of 16 bytes and aligned to that
//   out    s [B, chunk], inverse [chunk] of the rows that exist; of others, anything. closed [1]: whether there is a row
//          whose norm is not as halves.cuh has it
//   math   r_j = scale * u_j + shift;  inverse_j = 1 / max(|r_j|, eps), 1 without renormalize;  s_ij = z_i . r_j inverse_j
//   digits z_i times a power of two that brings its largest value to [2^14, 2^15), r_j times 256. Each value becomes two
//          fp16 numbers, x = high + low: off by 2^-22 |x| or, where `low` is below 2^-14, by 2^-25, which is 2^-33 of
//          r_j. A product is high high + high low + low high. 64 columns are added up by the tensor cores, which cut
//          off; then they are added to the rest in float.
//   grid   (blocks of anchors) x shares of the bank. As the screen's (screen.cu): a warp takes 16 rows at a time and
//          all D columns of them against the block's anchors, and no warp waits for another
//   keeps  the anchors as operands, both parts, in shared memory: 64 of them take 128 KB at D = 512. Where a GPU gives
//          a block less, 32
//   needs  compute capability 8.0; no spills; a chunk that is a multiple of 64 rows
//   order  every sum is one warp's: the same bits every run, whatever the grid
#include "halves.cuh"
#include "mma.cuh"
#include "row_tiles.cuh"

namespace xbn::cuda {
namespace {

constexpr int kSimilarityThreads = 256;  // more would have too few registers for the rows on their way
constexpr int kSimilarityWarps = kSimilarityThreads / kWarp;

constexpr int kEights = 2;          // of rows that a warp takes at a time
constexpr int kRows = 8 * kEights;  //
constexpr int kAhead = 4;           // steps, of 16 columns, on their way

// D, rounded up to what a warp takes at a time.
__host__ __device__ constexpr int columns_of(int64_t D) { return static_cast<int>(round_up(D, 16 * kAhead)); }

template <int kBands>
struct SimilarityShape {
  static constexpr int kAnchors = 16 * kBands;
  static constexpr int kTeams = kSimilarityWarps / kBands;  // of a warp to each band, while the anchors are brought
  static_assert(kSimilarityWarps % kBands == 0);
};

// The anchors as operands, and the map: in dynamic shared memory, as large as D wants it.
template <int kBands>
class SimilarityMemory {
 public:
  static int64_t bytes(int64_t D) {
    const int64_t columns = columns_of(D), of_anchors = columns / 16 * kBands * 2 * kWarp;
    return of_anchors * static_cast<int64_t>(sizeof(uint4)) + 2 * columns * static_cast<int64_t>(sizeof(float));
  }

  __device__ __forceinline__ explicit SimilarityMemory(int columns)
      : anchors_(&dynamic_shared_memory<uint4>()),
        map(reinterpret_cast<float*>(anchors_ + columns / 16 * kBands * 2 * kWarp)) {}

  // Those of a step of columns and sixteen anchors: high parts, low ones.
  __device__ __forceinline__ uint4* of(int step, int band) const {
    return anchors_ + (step * kBands + band) * 2 * kWarp;
  }

 private:
  uint4* anchors_;  // [step][band][high, low][lane]

 public:
  float* map;  // [2, columns] scale and shift, both times kRowTimes
};

__device__ __forceinline__ float largest_of(float4 x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

// The block's anchors, and the map, to shared memory; by all threads. `back`: what a product is to be multiplied by.
template <int kBands, typename S>
__device__ __forceinline__ void load_operands(const RankParams<float>& p, int columns,
                                              const SimilarityMemory<kBands>& shared, float (&back)[16 * kBands]) {
  using Shape = SimilarityShape<kBands>;
  __shared__ float largest_of_team[Shape::kTeams][Shape::kAnchors], times[Shape::kAnchors];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Shape::kAnchors;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int band = warp % kBands, team = warp / kBands, steps = columns / 16;
  const auto values = [&](int step, int half) {
    const int64_t i = first + 16 * band + 8 * half + g;
    const int column = RowLoad<S>::column(step, t);
    return i < p.B && column < p.D ? *reinterpret_cast<const float4*>(p.z + i * p.D + column) : zeros4();
  };
  float largest[2] = {};
#pragma unroll 2
  for (int step = team; step < steps; step += Shape::kTeams)
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = fmaxf(largest[half], largest_of(values(step, half)));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 1));
    largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 2));
    if (t == 0) largest_of_team[team][16 * band + 8 * half + g] = largest[half];
  }
  for (int d = thread; d < columns; d += kSimilarityThreads) {
    shared.map[d] = kRowTimes * (p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f);
    shared.map[columns + d] = kRowTimes * (p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f);
  }
  __syncthreads();
  if (thread < Shape::kAnchors) {
    float of_anchor = 0;
#pragma unroll
    for (int k = 0; k < Shape::kTeams; ++k) of_anchor = fmaxf(of_anchor, largest_of_team[k][thread]);
    const PowerOfTwo power(of_anchor);
    times[thread] = power.times;
    back[thread] = power.back / kRowTimes;
  }
  __syncthreads();
  const float upper = times[16 * band + g], lower = times[16 * band + 8 + g];
#pragma unroll 2
  for (int step = team; step < steps; step += Shape::kTeams) {
    const float4 a = values(step, 0), b = values(step, 1);
    const Halves x(upper * a.x, upper * a.y), y(lower * b.x, lower * b.y);
    const Halves z(upper * a.z, upper * a.w), w(lower * b.z, lower * b.w);
    shared.of(step, band)[lane] = make_uint4(x.high, y.high, z.high, w.high);
    shared.of(step, band)[kWarp + lane] = make_uint4(x.low, y.low, z.low, w.low);
  }
  __syncthreads();
}

template <int kBands, typename S>
__global__ void __launch_bounds__(kSimilarityThreads, 1)
    similarity_kernel(const MemoryLossParams<float, S> p, int64_t first, int chunk, float* s, float* inverse,
                      unsigned* closed) {
  using Rows = RowTiles<kEights, kAhead, kSimilarityWarps, S>;
  constexpr int kFours = RowLoad<S>::kFours, kLoads = kAhead / kFours;
  if constexpr (!kHasTensorCores) return;
  constexpr int kAnchors = SimilarityShape<kBands>::kAnchors;
  __shared__ float back[kAnchors];
  const int lane = threadIdx.x % kWarp, t = lane % 4, D = static_cast<int>(p.D);
  const int columns = columns_of(D);  // beyond D zeros
  const SimilarityMemory<kBands> shared(columns);
  const S* const bank = p.bank + first * p.D;
  const int count = static_cast<int>(smaller(chunk, stored_rows(p.count, p.M) - first));
  Rows coming(bank, D, count);
  typename Rows::Columns ahead[kLoads][kEights];
#pragma unroll
  for (int q = 0; q < kLoads; ++q) coming.load(q, D, ahead[q]);
  coming.go_on(bank, D, count, columns);
  load_operands<kBands, S>(p, columns, shared, back);  // while the first rows are on their way
  bool fits = true;
#pragma unroll 1
  for (int tile = Rows::first(); Rows::rows_of(count, tile) > 0; tile += Rows::apart()) {
    float sum[kBands][kEights][4] = {}, square[kEights] = {};
#pragma unroll 1
    for (int k = 0; k < columns; k += 16 * kAhead) {
      float part[kBands][kEights][4] = {};  // of these columns
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
#pragma unroll
        for (int four = 0; four < kFours; ++four) {
          const int step = kFours * q + four;
          uint2 high[kEights], low[kEights];
#pragma unroll
          for (int n = 0; n < kEights; ++n) {
            const float4 r =
                affine4(shared.map, shared.map + columns, k + RowLoad<S>::column(step, t), four_of(ahead[q][n], four));
            square[n] = dot4(r, r, square[n]);
            const Halves left(r.x, r.y), right(r.z, r.w);
            high[n] = make_uint2(left.high, right.high);
            low[n] = make_uint2(left.low, right.low);
          }
          if (four == kFours - 1) coming.load(q, D, ahead[q]);
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
            const uint4* const z = shared.of(k / 16 + step, band) + lane;
            const uint4 high_z = z[0], low_z = z[kWarp];
#pragma unroll
            for (int n = 0; n < kEights; ++n) multiply_add_halves(part[band][n], high_z, low_z, high[n], low[n]);
          }
        }
      }
      coming.go_on(bank, D, count, columns);
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[band][n][e] += part[band][n][e];
    }

    // A lane has the sums of rows 8 n + 2 t + c with anchors 16 band + 8 half + g. Its place is computed again: it
    // needs no registers in the loop above.
    const int lane = hidden(static_cast<int>(threadIdx.x)) % kWarp, g = lane / 4, t = lane % 4;
    const int rows = Rows::rows_of(count, tile);
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const float norm = sqrtf(sum_of_four_lanes(square[n])) / kRowTimes;
      const float inverse_norm = p.renormalize ? inverse_length(norm, static_cast<float>(p.eps)) : 1.0f;
      if (8 * n + g < rows) {
        fits = fits && norm >= kShortestRow && norm <= kLongestRow;
        if (t == 0 && blockIdx.x == 0) inverse[tile * kRows + 8 * n + g] = inverse_norm;
      }
      const float of_left = __shfl_sync(0xffffffffu, inverse_norm, 4 * (2 * t));
      const float of_right = __shfl_sync(0xffffffffu, inverse_norm, 4 * (2 * t + 1));
#pragma unroll
      for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int a = 16 * band + 8 * half + g;
          const int64_t i = static_cast<int64_t>(blockIdx.x) * kAnchors + a;
          if (i >= p.B) continue;
          const float left = sum[band][n][2 * half] * back[a] * of_left;
          const float right = sum[band][n][2 * half + 1] * back[a] * of_right;
          *reinterpret_cast<float2*>(s + i * chunk + tile * kRows + 8 * n + 2 * t) = make_float2(left, right);
        }
    }
  }
  if (!__all_sync(0xffffffffu, fits) && lane == 0 && blockIdx.x == 0) atomicOr(closed, 1u);
}

template <int kBands, typename S>
int launch_of(const MemoryLossParams<float, S>& p, const ChunkScores<float>& chunk, float* inverse, unsigned* closed,
              const Gpu& gpu) {
  const int64_t blocks = ceil_div(p.B, SimilarityShape<kBands>::kAnchors);
  const int64_t shares = larger(1, smaller(gpu.multiprocessors / blocks, ceil_div(chunk.chunk, kRows)));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
  return run_with_memory(static_cast<int>(SimilarityMemory<kBands>::bytes(p.D)), similarity_kernel<kBands, S>, grid,
                         kSimilarityThreads, gpu, p, chunk.first, static_cast<int>(chunk.chunk), chunk.s, inverse,
                         closed);
}

// Of static shared memory, and what a GPU keeps of a block's for itself.
constexpr int64_t kOtherBytes = 4 << 10;

}  // namespace

bool has_similarities(int64_t D, const Gpu& gpu) {
  return SimilarityMemory<2>::bytes(D) + kOtherBytes <= gpu.shared_memory;
}

template <typename S>
int launch_similarities(const MemoryLossParams<float, S>& p, const ChunkScores<float>& chunk, float* inverse,
                        unsigned* closed, const Gpu& gpu) {
  return SimilarityMemory<4>::bytes(p.D) + kOtherBytes <= gpu.shared_memory
             ? launch_of<4>(p, chunk, inverse, closed, gpu)
             : launch_of<2>(p, chunk, inverse, closed, gpu);
}

#define XBN_INSTANTIATE(S, ...)                                                                                     \
  template int launch_similarities(const MemoryLossParams<float, S>&, const ChunkScores<float>&, float*, unsigned*, \
                                   const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
