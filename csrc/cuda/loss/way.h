// The ways that memory_loss can go on a GPU: chosen in memory_loss.cpp.
#pragma once

#include "../../kernels.h"
#include "../../loss_way.h"

namespace xbn {

namespace cuda {

// simt, tensor (sweep.cu): one fused sweep over the bank, float32, D <= kSweepMaxDim. Its products by ordinary
// arithmetic; or by tensor cores, from compute capability 8.0 on, where the bank may be of 16 bits and must be wide.
constexpr int64_t kSweepMaxDim = 1024;

// Whether z and bank can be read by 16 bytes.
template <typename S>
bool is_wide(const MemoryLossParams<float, S>& p) {
  constexpr int64_t kWidth = 16 / sizeof(S);
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return p.D % kWidth == 0 && aligned(p.z) && aligned(p.bank);
}

template <typename S>
int sweep(const MemoryLossParams<float, S>& p, const LossSpec& loss, bool tensor, const Gpu& gpu);

// screen, pairs (screened.cu): Contrastive and Margin, with D, z and bank as for the sweep on tensor cores. By a screen in
// fp16 of all pairs and exact similarities of those it leaves; if these are more than `most` of all, by that sweep after
// all. Compute capability >= 8.0.
constexpr double kFew = 0.05;

// Contrastive losses of similarities, whose weights are 1 and -1.
inline bool takes_screen(const LossSpec& loss) { return loss.kind == LossKind::contrastive && !loss.euclidean; }

template <typename S>
int screened(const MemoryLossParams<float, S>& p, const LossSpec& loss, double most, const Gpu& gpu);

// Of a training step: the screen moves the rows as it reads them. B, M > 0; fewer than 2^31 rows.
int screened_in_place(const TransformParams<float>& t, const MemoryLossParams<float, float>& p, const LossSpec& loss,
                      double most, const Gpu& gpu);

// Of rows that were moved so (../transform.cu): the sums, and the map becomes the identity.
int follow(const TransformParams<float>& t, const Gpu& gpu);

// halves (halves.cu): similarities and weights of a chunk of the bank at a time, by products of fp16 halves. All losses
// without rounds, with D, z and bank as for the sweep on tensor cores. Compute capability >= 8.0.
// `chunk` rows of the bank at a time, a multiple of 64.
template <typename S>
int halves(const MemoryLossParams<float, S>& p, const LossSpec& loss, int64_t chunk, const Gpu& gpu);

// One whose similarities, or weights, stay in a GPU's second-level cache.
int64_t plan_chunk(int64_t B, int64_t M, const LossSpec& loss);

// composite (composite.cu): two library products for each chunk of the bank. Any dtypes, dimension and loss.
struct Chunks {
  int64_t rows;        // of the bank at a time; the last chunk is padded with rows that count for nothing
  int64_t thresholds;  // of an anchor in a round; 0: the loss has none
  int64_t rounds;      // as many as it takes if all of the bank are an anchor's positives; 1: the loss has no rounds
};

// Chunks that leave similarities and rows in a GPU's second-level cache, of numbers of so many bytes.
Chunks plan_chunks(int64_t B, int64_t M, int64_t D, int64_t bytes, const LossSpec& loss);

template <typename T, typename S>
int composite(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu);

// memory_sums (memory_sums.cu) goes this way only.
template <typename T, typename S>
int composite_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Chunks& chunks, const Gpu& gpu);

}  // namespace cuda
}  // namespace xbn
