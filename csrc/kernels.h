// Every op as the glue calls it: its params, one plain struct, and its kernels, one for a CPU (cpu/NAME.cpp) and, in
// namespace cuda, one for a GPU (cuda/NAME.cu); those of the loss are in loss/, where cuda/loss/memory_loss.cpp chooses
// a way. The pointers are to memory of the device that runs the op; a count is read there, so that the host does not
// wait for it.
// Letters: B batch rows, A anchors of them, M bank rows (capacity), D dimension, count filled bank rows.
// Every matrix is row-major and dense. Statistics (moments, sums, the affine map) are always double.
#pragma once

#include <cstdint>

#include "math/half.h"
#include "math/losses.h"

namespace xbn {

struct Cpu;  // cpu/cpu.h
namespace cuda {
class Gpu;  // cuda/gpu.h
}

// --- Params -----------------------------------------------------------------------------------------------------

template <typename T>
struct NormalizeParams {
  const T* x;    // [B, D]
  int64_t B, D;  //
  double eps;    //
  T* z;          // [B, D] out, the rows of x divided by max(norm, eps)
  double* norm;  // [B] out, of the rows of x
};

template <typename T>
struct NormalizeBackwardParams {
  const T* grad_z;     // [B, D] derivative by z
  const T* z;          // [B, D] as normalize gave it
  const double* norm;  // [B] as normalize gave it
  int64_t B, D;        //
  double eps;          // as normalize had it
  T* grad_x;           // [B, D] out, derivative by x
};

template <typename T>
struct MomentsParams {
  const T* x;        // [B, D]
  const bool* mask;  // [B] rows to measure, or null for all of them
  int64_t B, D;      //
  double* mean;      // [D] out
  double* std;       // [D] out, biased
  int64_t* rows;     // [1] out, rows measured: in the mask and finite
};

// Of the moments measured just before, on fewer than two rows nothing.
struct TrackParams {
  double* target_mean;   // [D] filter state, in and out
  double* target_std;    // [D] filter state, in and out
  double* variance;      // [1] filter variance, in and out; infinite before the first measurement
  double* innovation;    // [D] of the mean, in and out: process_noise is estimated from it; null: it is given
  double* scale;         // [D] pending map, in and out: a stored row u stands for scale * u + shift
  double* shift;         // [D]
  const double* sums;    // [2, D] sum and sum of squares of the stored rows
  const int64_t* count;  // [1] stored rows; an empty bank counts as standardised (mean 0, std 1)
  int64_t D;             //
  double process_noise;  // q, added to the variance every step; infinite: take over each measurement; 0 if estimated
  double measurement_noise;  // r
  double fixed_gain;         // < 0: the Kalman gain; else this gain after the first measurement
  double eps;                // standard deviations below it mark a dead dimension
  bool only_measures;        // the gaps and the gain, for stats; nothing else is written
  double* stats;             // [3] out, moment gap of bank and batch before and after the map, gain; or null
};

template <typename S>
struct TransformParams {
  S* bank;               // [M, D] rows [0, count) become scale * row + shift
  double* sums;          // [2, D] out, of the rows as written
  double* scale;         // [D] in; becomes 1
  double* shift;         // [D] in; becomes 0
  const int64_t* count;  // [1]
  int64_t M, D;          //
  // [1] of a training step: on a GPU the sums may be those of the map, with the rows counted again on a set period; or
  // null, and they are counted.
  const int64_t* step;
};

// Of a bank whose rows are rewritten if their coordinates are off standard; the map changes so that they stand for what
// they did.
template <typename S>
struct StandardizeParams : TransformParams<S> {
  const double* ring_sums;    // [2, D] of the ring that the bank is a part of, or sums: those decide
  const int64_t* ring_count;  // [1] or count
  double eps;                 // dimensions with a standard deviation below it are left alone
};

template <typename T, typename S>
struct EnqueueParams {
  S* bank;                // [rows, D] slots [first, first + rows) of the ring
  int64_t* bank_labels;   // [rows]
  int64_t* bank_ids;      // [rows] or null
  int64_t* bank_steps;    // [rows] or null
  double* sums;           // [2, D] moved by what enters the bank and what leaves it
  int64_t* head;          // [1] next slot to write
  int64_t* count;         // [1] filled slots
  const T* z;             // [B, D]
  const int64_t* labels;  // [B]
  const int64_t* ids;     // [B] of samples, or null; a negative one is stored as -2 - slot, which is no other row's
  const int64_t* step;    // [1] stored as the step of every row; null exactly when bank_steps is
  const bool* mask;       // [B] rows to store, or null for all of them
  const double* scale;    // [D] pending map: z is stored as (z - shift) / scale
  const double* shift;    // [D]
  int64_t* slots;         // [B] out: the slot each row went to, -1 where it was not stored
  int64_t B, M, D;        // M: slots of the ring
  int64_t first, rows;    //
};

// Of memory_loss, except the rows themselves.
template <typename T>
struct RankParams {
  const T* z;                  // [B, D] anchors
  const int64_t* labels;       // [B]
  const int64_t* bank_labels;  // [M]
  const int64_t* count;        // [1] only rows [0, count) of the bank exist; null: all M
  int64_t B, M, D;             //
  const double* scale;         // [D] pending map of the bank, or null: a row u stands for scale * u + shift
  const double* shift;         // [D] null exactly when scale is
  const int64_t* bank_ids;     // [M] the rows' ids (formulas.h: is_id), or null: a row's id is its number
  const int64_t* exclude;      // [B] rows with this id are not paired with the anchor, or null
  const bool* anchors;         // [B] rows that rank, or null for all of them
  bool renormalize;            // divide a bank row by max(norm, eps) as it is read
  double eps;                  //
  T* loss;                     // [1] out
  T* grad_z;                   // [B, D] out, or null: then the gradient product is skipped
  double* pairs;               // [2] out, positives and negatives of an anchor that have a weight, on average
};

template <typename T, typename S>
struct MemoryLossParams : RankParams<T> {
  const S* bank;  // [M, D]
};

// One pass of a loss against a bank that is a part of a longer one. Of the results it writes `grad_z`, not `loss` and
// `pairs`.
template <typename T, typename S>
struct MemorySumsParams : MemoryLossParams<T, S> {
  int number;           // of the pass in the loss's program
  int64_t first;        // number of the bank's first row in the whole
  const double* given;  // [B] what the pass is given, null exactly in the first one
  RowSums* sums;        // [kSlots, B] out; zeros where the pass fills no slot, or the row does not rank
  // grad_z [kSlots, B, D]: sum of weight * row, of exponents scaled by e^-shift; of an extreme, its row
};

// What the parts of a bank have added up to, for each anchor.
struct SettleSumsParams {
  const RowSums* parts;  // [n, kSlots, B]
  const bool* anchors;   // [B] rows that rank, or null for all of them
  int64_t n, B;          //
  int passes;            // of the loss's program that are done
  double* given;         // [B] out: to the next pass; zeros after the last, and for rows that do not rank
  double* scale;   // [n, kSlots, B] out: what the gradient of each part is multiplied by, besides the average over
                   // the anchors; zeros before the last pass is done
  double* totals;  // [7] out: LossSum; of a loss that gives in common, after its first pass: store_in_common
};

// For what does not look at the bank: it need not be compiled for each of its dtypes.
template <typename T, typename S>
MemoryLossParams<T, T> without_bank(const MemoryLossParams<T, S>& p) {
  return {p, nullptr};
}

// A rows of a batch, from its row `first` on, against all of it.
template <typename T>
struct BatchSumsParams {
  const T* dots;          // [A, B] of each anchor with every row of its own batch
  const int64_t* labels;  // [B]
  const int64_t* ids;     // [B] of samples, or null: rows of the same one (>= 0) are no pair
  const bool* anchors;    // [A] rows that rank, or null for all of them
  int64_t A, B, first;    //
  double* totals;         // [7] out: LossSum
  T* grad_dots;           // [A, B] out, up to the averages over the anchors; or null
};

// All rows of a batch: A is B. `grad_dots` is whole, with the averages; `totals` is not written.
template <typename T>
struct BatchLossParams : BatchSumsParams<T> {
  bool renormalize;  // divide a row by max(norm, eps): its norm is the root of its product with itself
  double eps;        //
  T* loss;           // [1] out
};

// What a step tells its loss of the batch, made of what the step was told. Null: is not asked for.
struct StepPairsParams {
  const bool* mask;      // [B] rows to store, which do not rank; null exactly when anchors is
  const int64_t* ids;    // [B] of samples; null exactly when exclude is
  const int64_t* slots;  // [B] where the rows have been stored, or null: nowhere
  const int64_t* step;   // [1] steps taken
  const int64_t* count;  // [1] stored rows
  int64_t B;             //
  int64_t warmup_steps;  // before so many steps no stored row is ranked
  bool* anchors;         // [B] out
  int64_t* exclude;      // [B] out, the ids; of a row without one, that which it has in the bank, or -1
  int64_t* ranked;       // [1] out
};

// The loss of a step, own_weight * own_loss + memory_weight * memory_loss, and its derivative by the batch; the step is
// counted.
template <typename T>
struct StepTotalParams {
  const T* own_loss;     // [1] of the batch against itself, or null
  const T* memory_loss;  // [1] against the bank, or null
  double own_weight, memory_weight;
  T* loss;               // [1] out
  int64_t* step;         // [1] in and out
  double* no_pairs;      // [2] out, NaN: there is no memory_loss, so no pairs of it; or null
  const T* own_anchors;  // [B, D] derivative of own_loss by the rows as anchors, null exactly when own_loss is
  const T* own_rows;     // [B, D] and by the rows that are ranked
  const T* grad_memory;  // [B, D] derivative of memory_loss by the anchors, null exactly when that is
  double*
      mean_gradient;    // [D] out, of grad_memory across the embeddings, over the anchors: is taken off theirs; or null
  double* along;        // [B] out, with it: how much of grad_memory is along an embedding, over its squared length
  const T* ranking;     // [B, D] the rows that rank
  const bool* anchors;  // [B] which of them do; null: all
  const T* z;           // [B, D] the batch as normalised; null if it is not
  const double* norm;   // [B] before that; null exactly when z is
  int64_t B, D;         //
  double eps;           // lower bound of norms
  T* grad;              // [B, D] out, derivative by the batch before it was normalised; null: is not asked for
  T* grad_rows;         // [B, D] out, by the rows that are ranked, where these are not the anchors; or null
};

// --- On a CPU: returns when it is done -----------------------------------------------------------------------------

template <typename T>
void normalize(const NormalizeParams<T>& p, const Cpu& cpu);
template <typename T>
void normalize_backward(const NormalizeBackwardParams<T>& p, const Cpu& cpu);
template <typename T>
void moments(const MomentsParams<T>& p, const Cpu& cpu);
template <typename T>
void track(const MomentsParams<T>& measured, const TrackParams& p, const Cpu& cpu);
template <typename S>
void transform(const TransformParams<S>& p, const Cpu& cpu);
template <typename S>
void standardize(const StandardizeParams<S>& p, const Cpu& cpu);
template <typename T, typename S>
void enqueue(const EnqueueParams<T, S>& p, const Cpu& cpu);
template <typename T, typename S>
void memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Cpu& cpu);
template <typename T, typename S>
void transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                           const Cpu& cpu);
template <typename T, typename S>
void memory_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Cpu& cpu);
void settle_sums(const SettleSumsParams& p, const LossSpec& loss, const Cpu& cpu);
template <typename T>
void batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Cpu& cpu);
template <typename T>
void batch_sums(const BatchSumsParams<T>& p, const LossSpec& loss, const Cpu& cpu);
void step_pairs(const StepPairsParams& p, const Cpu& cpu);
template <typename T>
void step_total(const StepTotalParams<T>& p, const Cpu& cpu);

// --- On a GPU: puts its kernels on the stream and returns at once, a CUDA error or 0 --------------------------------

namespace cuda {

template <typename T>
int normalize(const NormalizeParams<T>& p, const Gpu& gpu);
template <typename T>
int normalize_backward(const NormalizeBackwardParams<T>& p, const Gpu& gpu);
template <typename T>
int moments(const MomentsParams<T>& p, const Gpu& gpu);
template <typename T>
int track(const MomentsParams<T>& measured, const TrackParams& p, const Gpu& gpu);
template <typename S>
int transform(const TransformParams<S>& p, const Gpu& gpu);
template <typename S>
int standardize(const StandardizeParams<S>& p, const Gpu& gpu);
template <typename T, typename S>
int enqueue(const EnqueueParams<T, S>& p, const Gpu& gpu);
// Throws if memory_loss cannot go the way that is forced.
template <typename T, typename S>
void check_way(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu);
template <typename T, typename S>
int memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu);
template <typename T, typename S>
int transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                          const Gpu& gpu);
template <typename T, typename S>
int memory_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Gpu& gpu);
int settle_sums(const SettleSumsParams& p, const LossSpec& loss, const Gpu& gpu);
template <typename T>
int batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Gpu& gpu);
template <typename T>
int batch_sums(const BatchSumsParams<T>& p, const LossSpec& loss, const Gpu& gpu);
int step_pairs(const StepPairsParams& p, const Gpu& gpu);
template <typename T>
int step_total(const StepTotalParams<T>& p, const Gpu& gpu);

}  // namespace cuda
}  // namespace xbn
