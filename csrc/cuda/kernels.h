// What the glue calls to run a kernel: no CUDA header needed, a stream is a void* and an error an int (0: none).
//
// Every launch_<op> puts its kernels on the stream and returns at once. It takes its temporary memory from the caller:
// <op>_workspace says how many bytes, of any content, aligned to 256.
#pragma once

#include "../math/losses.h"
#include "../params.h"

namespace xbn::cuda {

struct Launch {
  void* stream;         // cudaStream_t
  int multiprocessors;  // of the device
  void* workspace;      // <op>_workspace(…) bytes
};

// --- The device -------------------------------------------------------------------------------------------------

struct DeviceInfo {
  int multiprocessors;
  int capability;  // major * 10 + minor
};

// Makes `device` current and describes it.
int use_device(int device, DeviceInfo* info);

const char* error_string(int error);
bool is_missing_kernel(int error);       // the build has nothing for this GPU
bool is_insufficient_driver(int error);  // the driver is older than the CUDA this was built with

// What this build has machine code for, as in "75;80;90a;80-ptx".
const char* architectures();

// --- Rows of unit length ----------------------------------------------------------------------------------------
// Without a workspace.

template <typename T>
int launch_normalize(const NormalizeParams<T>& p, const Launch& launch);

template <typename T>
int launch_normalize_backward(const NormalizeBackwardParams<T>& p, const Launch& launch);

// --- Moments ----------------------------------------------------------------------------------------------------

int64_t moments_workspace(int64_t B, int64_t D);

template <typename T>
int launch_moments(const MomentsParams<T>& p, const Launch& launch);

// moments, then the filter and the map: not a launch more.
template <typename T>
int launch_track(const MomentsParams<T>& moments, const TrackParams& p, const Launch& launch);

// --- The bank ---------------------------------------------------------------------------------------------------

int64_t rewrite_workspace(int64_t M, int64_t D);  // of transform and standardize

template <typename S>
int launch_transform(const TransformParams<S>& p, const Launch& launch);

template <typename S>
int launch_standardize(const StandardizeParams<S>& p, const Launch& launch);

int64_t enqueue_workspace(int64_t B);

template <typename T, typename S>
int launch_enqueue(const EnqueueParams<T, S>& p, const Launch& launch);

// --- The loss ---------------------------------------------------------------------------------------------------

// One fused sweep over the bank: float32 for anchors and bank, D <= kSweepMaxDim. Its products by tensor cores (which a
// GPU has from compute capability 8.0 on; code for older ones ignores it) or by ordinary arithmetic.
constexpr int64_t kSweepMaxDim = 1024;

int64_t sweep_workspace(int64_t B, int64_t M, int64_t D, const LossSpec& loss, bool need_grad, int multiprocessors);

int launch_sweep(const MemoryLossParams<float, float>& p, const LossSpec& loss, bool tensor, const Launch& launch);

// Contrastive with D, z and bank as for the sweep, by a screen in fp16 of all pairs and exact similarities of those it
// leaves; if these are more than `most` of all, by the sweep on tensor cores after all. Compute capability >= 8.0.
constexpr double kFew = 0.05;

int64_t screened_workspace(int64_t B, int64_t M, int64_t D, const LossSpec& loss, bool need_grad, int multiprocessors);

int launch_screened(const MemoryLossParams<float, float>& p, const LossSpec& loss, double most, const Launch& launch);

// Two library products per chunk of the bank, which the caller does. The order of calls:
//
//     for every round:
//       for every pass k of the loss's program:
//         launch_composite_begin
//         for every chunk:   launch_composite_rows     rows [chunk, D] = the bank rows as they count
//                            s [B, chunk] = z @ rows.T
//                            launch_composite_score    s [slots * B, chunk] becomes weights, grad is scaled as exponents grow
//                            grad [slots * B, D] += weights @ rows, for the slots of a pass that has a gradient
//         launch_composite_end
template <typename T>
struct Composite {
  int64_t chunk;       // bank rows at a time; the last chunk is padded with rows that count for nothing
  int64_t chunks;      //
  int64_t slots;       // of the loss: each has weights and a gradient of its own
  int64_t thresholds;  // of an anchor in a round; 0: the loss has none
  int64_t rounds;      // as many as it takes if all of the bank are an anchor's positives; 1: the loss has no rounds
  int64_t round;       // the one at hand, from 0 on
  T* rows;             // [chunk, D]
  T* s;                // [slots * B, chunk]
  T* grad;             // [slots * B, D], zero at first; or null
};

// Chunks that leave similarities and rows in a GPU's second-level cache.
template <typename T>
Composite<T> plan_composite(int64_t B, int64_t M, int64_t D, const LossSpec& loss);

template <typename T>
int64_t composite_workspace(int64_t B, int64_t D, const Composite<T>& c);

template <typename T, typename S>
int launch_composite_begin(const MemoryLossParams<T, S>& p, const Pass& pass, int k, const Composite<T>& c,
                           const Launch& launch);

template <typename T, typename S>
int launch_composite_rows(const MemoryLossParams<T, S>& p, const Composite<T>& c, int64_t first, const Launch& launch);

template <typename T, typename S>
int launch_composite_score(const MemoryLossParams<T, S>& p, const Pass& pass, const Composite<T>& c, int64_t first,
                           const Launch& launch);

template <typename T, typename S>
int launch_composite_end(const MemoryLossParams<T, S>& p, const LossSpec& loss, int k, const Composite<T>& c,
                         const Launch& launch);

// --- The batch's own loss ---------------------------------------------------------------------------------------

template <typename T>
int64_t batch_loss_workspace(int64_t B, const LossSpec& loss);

template <typename T>
int launch_batch_loss(const BatchLossParams<T>& p, const LossSpec& loss, const Launch& launch);

}  // namespace xbn::cuda
