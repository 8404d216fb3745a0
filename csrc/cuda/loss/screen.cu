// The screen of memory_loss: which pairs may have a weight, by one product in fp16 and a bound of its error.
//
//   in     z [B, D], labels [B]; bank [M, D], bank_labels [M]; rows [0, count) count; z in float32, bank in
//          that or 16 bits; D <= 1024, rows of a multiple of 16 bytes and aligned to that
//   out    mask [B, words]: a bit for each pair; found [1]: how many are set. Where the rows are moved, the bank: rows
//          [0, moving.count) become r below, by moving.scale and moving.shift
//   math   r_j = scale * u_j + shift.  A negative pair has a weight where z_i . r_j > margin max(|r_j|, eps) (without
//          renormalize: > margin). Of an s that is off by at most `error`, the bit is clear where
//              s < margin max(|r_j|, eps) - error,
//          and where the labels differ in 32 bits of each: so a positive pair has its bit, and a false one does no
//          harm. A NaN is not below anything, so what is not finite keeps its bits. An anchor that does not rank has no
//          bits.
//   error  of s, with n = sqrt(D) and u = 2^-11, what fp16 rounds to:
//            operands  |z'_d - z_d| <= u |z_d| + u^2 2^-3, the latter below 2^-14, where fp16 has fixed steps of 2^-24;
//                      and never more than |z_d|. So with e = 2^-25 n
//                      |z' . r' - z . r| <= |z' - z| |r'| + |z| |r' - r|
//                                        <= (2 u + u^2) |z| |r| + e (1 + u) (|z| + |r|) + e min(|z|, |r|)
//            sums      a tensor core brings 16 products, exact, and the sum so far to the largest one's exponent and
//                      cuts them off there, behind 24 bits or later; then it cuts off their sum. Some add only 4 at a
//                      time. Each of D products and D / 4 sums so far loses 2^-23 of the largest, as each result does,
//                      and all are at most |z'| |r'|: together 1.5 D 2^-23 |z| |r|, by rounding less. What is below
//                      2^-14 may be brought to the exponent of 2^-14: D 2^-36 (|z| + |r|) more, which is e / 60.
//            exact     the sums of pairs.cu and of the sweep, in float: below D 2^-24 |z| |r|
//            norms     by fma in float, a quarter of the columns in each of four lanes: a share of (D / 8 + 3) 2^-24 of
//                      them; below 2^-69 only rounding to zero
//            map       scale, shift and fma in float: of a row off by 2^-23 (|r| + |shift|), if they are no subnormals
//          `product` holds 2 u, the sums and the exact ones, 2 D 2^-23, and 2^-18 for u^2, the norms', the map's and
//          the limit's own rounding; `number` is 2 e; `norm` is twice the norms' share and more.
//          An |r| above 6e4 may overflow in fp16, so such a row keeps all its pairs; an anchor's value beyond that, or
//          one that is not finite, becomes a NaN, and it keeps its pairs. Not Inf: a sum that is -Inf is below any
//          limit. |z| is the largest of the block's anchors.
//   grid   (blocks of 64 anchors, 32 above D = 512) x shares of the bank. A warp takes 16 rows at a time, or 32, and
//          all D columns of them against the block's anchors; no warp waits for another. A lane's 16 bytes of a row are
//          what it needs of a product's operand, of two products' where they hold eight values: the columns of a step
//          are taken in an order of their own, the same for anchors and rows. Some loads are on their way, the next
//          rows' when these end. Where the rows are moved, the first block of anchors comes first, in a launch of its
//          own: it writes each row that it has read, and the others read what it wrote.
//   keeps  the anchors as operands in fp16, and the map: in shared memory, 69 KB at D = 512
//   needs  compute capability 8.0; fewer than 2^31 bank rows; no spills
//   order  sums of integers only: the same bits every run, whatever the grid
#include "screen.cuh"

#include "../vectors.cuh"
#include "mma.cuh"
#include "row_tiles.cuh"

namespace xbn::cuda {
namespace {

constexpr int kScreenThreads = 384;  // more would have too few registers for the rows on their way
constexpr int kScreenWarps = kScreenThreads / kWarp;
constexpr float kLargest = 6e4f;  // below the largest number of fp16, 65504

template <int kDim>
struct ScreenShape {
  static constexpr int kAnchors = kDim <= 512 ? 64 : 32;
  static constexpr int kBands = kAnchors / 16;
  static constexpr int kEights = kDim <= 512 ? 2 : 4;   // of rows that a warp takes at a time
  static constexpr int kRows = 8 * kEights;             //
  static constexpr int kAhead = kDim <= 512 ? 4 : 2;    // steps on their way
  static constexpr int kSteps = kDim / 16;              // of columns
  static constexpr int kTeams = kScreenWarps / kBands;  // of a warp to each band, while the anchors are brought
  static_assert(kRows == 16 || kRows == 32);
  static_assert(kSteps % kAhead == 0 && kScreenWarps % kBands == 0);
};

// Below which a pair of different labels has no weight.
struct ScreenLimit {
  ScreenBound bound;
  float margin, eps;
  bool renormalize;

  // What the anchors and the map make of the bound: `moved` is |shift|.
  __device__ __forceinline__ float fixed(float z, float moved) const {
    const float steep = fabsf(margin);
    return bound.map * moved * (z + steep) + bound.least * steep + bound.number * z;
  }
  __device__ __forceinline__ float of_norm(float z) const { return bound.product * z + bound.number; }

  __device__ __forceinline__ float operator()(float norm, float fixed, float of_norm) const {
    const float threshold = margin * (renormalize ? length(norm, eps) : 1.0f);
    const float slack = bound.norm * fabsf(threshold) + of_norm * norm + fixed;
    return norm <= kLargest ? threshold - slack : -INFINITY;
  }
};

template <int kDim>
struct ScreenMemory {
  using Shape = ScreenShape<kDim>;
  uint4 anchors[Shape::kBands * Shape::kSteps * kWarp];  // [band][step][lane]
  float scale[kDim];
  float shift[kDim];
  float square[Shape::kTeams][Shape::kAnchors];
  uint2 label[Shape::kAnchors];            // its hash; and all bits, or none where the anchor does not rank
  float largest[Shape::kAnchors / kWarp];  // |z|
  float fixed, of_norm;                    // of the limit
};
static_assert(sizeof(ScreenMemory<512>) <= 99 << 10 && sizeof(ScreenMemory<1024>) <= 99 << 10);

__device__ __forceinline__ uint32_t hash_of(int64_t label) {
  return static_cast<uint32_t>(label) + 0x9e3779b9u * static_cast<uint32_t>(label >> 32);
}

// What becomes of an anchor's value.
__device__ __forceinline__ float fitting(float x) { return fabsf(x) <= kLargest ? x : NAN; }

__device__ __forceinline__ float4 fitting4(float4 x) {
  return make_float4(fitting(x.x), fitting(x.y), fitting(x.z), fitting(x.w));
}

// What a launch does: the blocks of anchors from `first` on; and it may move rows.
template <typename S>
struct ScreenPart {
  int first;
  S* moved;              // the bank, if it does
  const int64_t* count;  // [1] of its rows
};

// The block's anchors, and the map, to shared memory; by all threads.
template <int kDim, typename S>
__device__ __forceinline__ void load_operands(const RankParams<float>& p, int first_block, const ScreenLimit& limit_of,
                                              ScreenMemory<kDim>& shared) {
  using Shape = ScreenShape<kDim>;
  const int64_t first = (first_block + static_cast<int64_t>(blockIdx.x)) * Shape::kAnchors;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int band = warp % Shape::kBands, team = warp / Shape::kBands;
  float square[2] = {};
#pragma unroll 4
  for (int step = team; step < Shape::kSteps; step += Shape::kTeams) {
    const int column = RowLoad<S>::column(step, t);
    float4 x[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first + 16 * band + 8 * half + g;
      x[half] = i < p.B && column < p.D ? fitting4(*reinterpret_cast<const float4*>(p.z + i * p.D + column)) : zeros4();
      square[half] = dot4(x[half], x[half], square[half]);
    }
    shared.anchors[(band * Shape::kSteps + step) * kWarp + lane] = make_uint4(
        pack_f16(x[0].x, x[0].y), pack_f16(x[1].x, x[1].y), pack_f16(x[0].z, x[0].w), pack_f16(x[1].z, x[1].w));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    square[half] = sum_of_four_lanes(square[half]);
    if (t == 0) shared.square[team][16 * band + 8 * half + g] = square[half];
  }
  for (int d = thread; d < kDim; d += kScreenThreads) {
    shared.scale[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.scale[d]) : 1.0f;
    shared.shift[d] = p.scale != nullptr && d < p.D ? static_cast<float>(p.shift[d]) : 0.0f;
  }
  __syncthreads();
  if (warp < Shape::kAnchors / kWarp) {
    const int64_t i = first + thread;
    const bool ranks = i < p.B && is_marked(p.anchors, i);
    shared.label[thread] = make_uint2(i < p.B ? hash_of(p.labels[i]) : 0, ranks ? ~0u : 0u);
    float of_anchor = 0;
#pragma unroll
    for (int k = 0; k < Shape::kTeams; ++k) of_anchor += shared.square[k][thread];
    float largest = of_anchor >= 0 ? sqrtf(of_anchor) : 0.0f;  // a NaN keeps its pairs anyway
    for (int step = 1; step < kWarp; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (lane == 0) shared.largest[warp] = largest;
  }
  __syncthreads();
  if (warp == 0) {
    float largest = 0, moved = 0;
#pragma unroll
    for (int k = 0; k < Shape::kAnchors / kWarp; ++k) largest = fmaxf(largest, shared.largest[k]);
    for (int d = lane; d < kDim; d += kWarp) moved = fmaf(shared.shift[d], shared.shift[d], moved);
    for (int step = 1; step < kWarp; step *= 2) moved += __shfl_xor_sync(0xffffffffu, moved, step);
    if (lane == 0) {
      shared.fixed = limit_of.fixed(largest, sqrtf(moved));
      shared.of_norm = limit_of.of_norm(largest);
    }
  }
  __syncthreads();
}

// kMoves: the rows of a float32 bank become what the map makes of them.
template <int kDim, typename S, bool kMoves>
__global__ void __launch_bounds__(kScreenThreads, 1)
    screen_kernel(const MemoryLossParams<float, S> p, const ScreenLimit limit_of, const Screen screen,
                  const ScreenPart<S> part) {
  using Shape = ScreenShape<kDim>;
  using Rows = RowTiles<Shape::kEights, Shape::kAhead, kScreenWarps, S>;
  constexpr int kBands = Shape::kBands, kEights = Shape::kEights, kRows = Shape::kRows, kAhead = Shape::kAhead;
  constexpr int kFours = RowLoad<S>::kFours, kLoads = kAhead / kFours;
  if constexpr (!kHasTensorCores) return;
  ScreenMemory<kDim>& shared = dynamic_shared_memory<ScreenMemory<kDim>>();
  const int lane = threadIdx.x % kWarp, t = lane % 4, D = static_cast<int>(p.D);
  const int columns = (D + 16 * kAhead - 1) / (16 * kAhead) * (16 * kAhead);  // beyond D zeros
  const int count = static_cast<int>(stored_rows(kMoves ? part.count : p.count, p.M));
  Rows coming(p.bank, D, count);
  typename Rows::Columns ahead[kLoads][kEights];
#pragma unroll
  for (int q = 0; q < kLoads; ++q) coming.load(q, D, ahead[q]);
  coming.go_on(p.bank, D, count, columns);
  load_operands<kDim, S>(p, part.first, limit_of, shared);  // while the first rows are on their way
  unsigned found = 0;
#pragma unroll 1
  for (int tile = Rows::first(); Rows::rows_of(count, tile) > 0; tile += Rows::apart()) {
    const uint32_t label =
        lane < Rows::rows_of(count, tile) ? hash_of(p.bank_labels[static_cast<int64_t>(tile) * kRows + lane]) : 0;
    float sum[kBands][kEights][4] = {}, square[kEights] = {};
    S* to = nullptr;
    int rows_to = 0;  // from this lane's first on
    if constexpr (kMoves) {
      to = part.moved + (static_cast<int64_t>(tile) * kRows + lane / 4) * D + 4 * t;
      rows_to = Rows::rows_of(count, tile) - lane / 4;
    }
#pragma unroll 1
    for (int k = 0; k < columns; k += 16 * kAhead) {
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
#pragma unroll
        for (int four = 0; four < kFours; ++four) {
          const int step = kFours * q + four;
          uint2 operand[kEights];
#pragma unroll
          for (int n = 0; n < kEights; ++n) {
            const float4 r =
                affine4(shared.scale, shared.shift, k + RowLoad<S>::column(step, t), four_of(ahead[q][n], four));
            if constexpr (kMoves)
              if (8 * n < rows_to && k + 16 * step + 4 * t < D) store4(to + 8 * n * D + k + 16 * step, r);
            square[n] = dot4(r, r, square[n]);
            operand[n] = make_uint2(pack_f16(r.x, r.y), pack_f16(r.z, r.w));
          }
          if (four == kFours - 1) coming.load(q, D, ahead[q]);
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
            const uint4 z = shared.anchors[(band * Shape::kSteps + k / 16 + step) * kWarp + lane];
#pragma unroll
            for (int n = 0; n < kEights; ++n) multiply_add_f16(sum[band][n], z, operand[n]);
          }
        }
      }
      coming.go_on(p.bank, D, count, columns);
    }

    // A lane has the sums of rows 8 n + 2 t + c with anchors 16 band + 8 half + g. Its place is computed again: it
    // needs no registers in the loop above.
    const int lane = hidden(static_cast<int>(threadIdx.x)) % kWarp, g = lane / 4, t = lane % 4;
    const int64_t first = (part.first + static_cast<int64_t>(blockIdx.x)) * Shape::kAnchors;
    const int rows = Rows::rows_of(kMoves ? static_cast<int>(stored_rows(p.count, p.M)) : count, tile);
    float limit[kEights][2];
    uint32_t row_label[kEights][2], exists = 0;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const float of_row = limit_of(sqrtf(sum_of_four_lanes(square[n])), shared.fixed, shared.of_norm);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = 8 * n + 2 * t + c;
        limit[n][c] = __shfl_sync(0xffffffffu, of_row, 4 * (2 * t + c));
        row_label[n][c] = __shfl_sync(0xffffffffu, label, j);
        exists |= static_cast<uint32_t>(j < rows) << j;
      }
    }
    uint32_t kept[kBands / 2] = {};  // of anchors 8 (4 k + t) + g, all rows
#pragma unroll
    for (int eight = 0; eight < 2 * kBands; ++eight) {
      const uint2 mine = shared.label[8 * eight + g];
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool may = !(sum[eight / 2][n][eight % 2 * 2 + c] < limit[n][c]) || row_label[n][c] == mine.x;
          bits |= static_cast<uint32_t>(may) << (8 * n + 2 * t + c);
        }
      bits &= exists & mine.y;
      bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
      bits |= __shfl_xor_sync(0xffffffffu, bits, 2);
      if (eight % 4 == t) kept[eight / 4] = bits;
    }
#pragma unroll
    for (int k = 0; k < kBands / 2; ++k) {
      const int64_t i = first + 8 * (4 * k + t) + g;
      if (i >= p.B) continue;
      uint32_t* words = screen.mask + i * screen.words(p.M);
      if constexpr (kRows == 32)
        words[tile] = kept[k];
      else
        reinterpret_cast<uint16_t*>(words)[tile] = static_cast<uint16_t>(kept[k]);
      found += static_cast<unsigned>(__popc(kept[k]));
    }
  }
  unsigned long long of_warp = found;
  for (int step = 1; step < kWarp; step *= 2) of_warp += __shfl_xor_sync(0xffffffffu, of_warp, step);
  if (lane == 0 && of_warp != 0) atomicAdd(screen.found, of_warp);
}

template <int kDim, typename S>
int launch_of(const TransformParams<S>* moving, const MemoryLossParams<float, S>& p, float margin,
              const ScreenBound& bound, const Screen& screen, const Gpu& gpu) {
  using Shape = ScreenShape<kDim>;
  const ScreenLimit limit = {bound, margin, static_cast<float>(p.eps), p.renormalize};
  const auto launch = [&](auto kernel, const MemoryLossParams<float, S>& of, int64_t blocks,
                          const ScreenPart<S>& part) -> int {
    if (blocks == 0) return cudaSuccess;
    const int64_t shares = larger(1, smaller(gpu.multiprocessors / blocks, ceil_div(p.M, Shape::kRows)));
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
    return run_with_memory(sizeof(ScreenMemory<kDim>), kernel, grid, kScreenThreads, gpu, of, limit, screen, part);
  };
  int64_t blocks = ceil_div(p.B, Shape::kAnchors);
  ScreenPart<S> part = {};
  if constexpr (std::is_same_v<S, float>) {
    if (moving != nullptr) {
      MemoryLossParams<float, S> mapped = p;
      mapped.scale = moving->scale, mapped.shift = moving->shift;
      const int error = launch(screen_kernel<kDim, S, true>, mapped, 1, {0, moving->bank, moving->count});
      if (error != cudaSuccess) return error;
      --blocks, part.first = 1;
    }
  }
  return launch(screen_kernel<kDim, S, false>, p, blocks, part);
}

}  // namespace

ScreenBound screen_bound(int64_t D) {
  const double d = static_cast<double>(D), unit = 0x1p-24;  // float rounds to
  return {static_cast<float>(0x1p-10 + 4 * d * unit + 0x1p-18), static_cast<float>(1.001 * 0x1p-24 * std::sqrt(d)),
          static_cast<float>((d / 4 + 32) * unit), 0x1p-22f, 0x1p-68f};
}

template <typename S>
int launch_screen(const TransformParams<S>* moving, const MemoryLossParams<float, S>& p, float margin,
                  const ScreenBound& bound, const Screen& screen, const Gpu& gpu) {
  const int error = cudaMemsetAsync(screen.found, 0, sizeof(*screen.found), static_cast<cudaStream_t>(gpu.stream));
  if (error != cudaSuccess) return error;
  if (p.D <= 128) return launch_of<128>(moving, p, margin, bound, screen, gpu);
  if (p.D <= 256) return launch_of<256>(moving, p, margin, bound, screen, gpu);
  if (p.D <= 512) return launch_of<512>(moving, p, margin, bound, screen, gpu);
  return launch_of<1024>(moving, p, margin, bound, screen, gpu);
}

#define XBN_INSTANTIATE(S, ...)                                                                                       \
  template int launch_screen(const TransformParams<S>*, const MemoryLossParams<float, S>&, float, const ScreenBound&, \
                             const Screen&, const Gpu&);
XBN_FOR_EACH_FLOAT_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE

}  // namespace xbn::cuda
