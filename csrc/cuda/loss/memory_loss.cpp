// memory_loss and memory_sums on a GPU: which way they go. simt, tensor: sweep.cu. screen, pairs: screened.cu.
// halves: halves.cu. composite: composite.cu, and of sums memory_sums.cu. way.h has their interfaces.
#include "../../check.h"
#include "../gpu.h"
#include "way.h"

namespace xbn::cuda {
namespace {

// From here on two library products beat the sweep: on an H200, in float32, they were slower with 256 anchors (1278 us
// to 978) and faster with 1024 (3358 to 3813). The screen beats both at every size measured. tools/gpu_check measures
// it.
constexpr int64_t kCompositeFrom = 512;  // anchors

// Beyond these the screen's mask, a bit for each pair, would take more than 256 MB.
constexpr int64_t kMostScreened = int64_t{1} << 31;  // pairs

// Whether the fused ways take them: arithmetic in float.
template <typename T, typename S>
constexpr bool kInFloat = std::is_same_v<T, float> && !std::is_same_v<S, double>;

// The one asked for, or by the shapes. Throws if that is impossible. What the tensor cores' ways cannot read goes by
// ordinary arithmetic, or by library products if its bank is of 16 bits.
template <typename T, typename S>
LossWay way_of(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu) {
  const LossWay wanted = loss_way();
  if (wanted == LossWay::composite) return wanted;
  const bool has_tensor_cores = gpu.capability >= 80, can_screen = takes_screen(loss);
  const bool can_sweep = kInFloat<T, S> && p.D <= kSweepMaxDim && !goes_in_rounds(loss);
  const LossWay otherwise = can_sweep && std::is_same_v<S, float> ? LossWay::simt : LossWay::composite;
  bool multiplies = false;
  if constexpr (kInFloat<T, S>) multiplies = can_sweep && has_tensor_cores && is_wide(p);
  if (wanted == LossWay::automatic) {
    if (multiplies && can_screen && p.B <= kMostScreened / (p.M > 0 ? p.M : 1)) return LossWay::screen;
    if (!can_sweep || p.B >= kCompositeFrom) return LossWay::composite;
    return multiplies ? LossWay::tensor : otherwise;
  }
  const char* name = name_of(wanted);
  const bool screens = wanted == LossWay::screen || wanted == LossWay::pairs;
  check(!goes_in_rounds(loss), gpu.op, ": way '", name, "' does not have triplet_all");
  check(!screens || can_screen, gpu.op, ": way '", name,
        "' has contrastive and margin losses only, of cosine or squared Euclidean distance");
  check(can_sweep, gpu.op, ": way '", name, "' takes float32 embeddings, no float64 bank, and at most ", kSweepMaxDim,
        " dimensions");
  check(wanted == LossWay::simt || has_tensor_cores, gpu.op, ": way '", name,
        "' needs a GPU of compute capability 8.0 or later, this one has ", gpu.capability / 10, ".",
        gpu.capability % 10);
  check(wanted != LossWay::simt || otherwise == wanted, gpu.op, ": way '", name, "' takes a float32 bank");
  return wanted == LossWay::simt || multiplies ? wanted : otherwise;
}

// Of all pairs, how many the screen may leave.
double most_of(LossWay way) { return way == LossWay::pairs ? 1.0 : kFew; }

template <typename T, typename S>
int go(LossWay way, const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu) {
  if constexpr (kInFloat<T, S>) {
    if (way == LossWay::screen || way == LossWay::pairs) return screened(p, loss, most_of(way), gpu);
    if (way == LossWay::halves) return halves(p, loss, plan_chunk(p.B, p.M, loss), gpu);
    if (way != LossWay::composite) return sweep(p, loss, way == LossWay::tensor, gpu);
  }
  return composite(p, loss, plan_chunks(p.B, p.M, p.D, sizeof(T), loss), gpu);
}

}  // namespace

template <typename T, typename S>
void check_way(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu) {
  way_of(p, loss, gpu);
}

template <typename T, typename S>
int memory_loss(const MemoryLossParams<T, S>& p, const LossSpec& loss, const Gpu& gpu) {
  return go(way_of(p, loss, gpu), p, loss, gpu);
}

// One after the other: the transform also adds up every value that it writes, so it would not be free inside the sweep.
// Where the sums need not be counted, the screen moves the rows.
template <typename T, typename S>
int transform_memory_loss(const TransformParams<S>& t, const MemoryLossParams<T, S>& p, const LossSpec& loss,
                          const Gpu& gpu) {
  const LossWay way = way_of(p, loss, gpu);  // throws before anything is written
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, float>) {
    const bool screens = way == LossWay::screen || way == LossWay::pairs;
    if (screens && t.step != nullptr && p.B > 0 && p.M > 0 && p.M <= INT32_MAX)
      return screened_in_place(t, p, loss, most_of(way), gpu);
  }
  const int error = transform(t, gpu);
  return error != 0 ? error : go(way, p, loss, gpu);
}

template <typename T, typename S>
int memory_sums(const MemorySumsParams<T, S>& p, const LossSpec& loss, const Gpu& gpu) {
  return composite_sums(p, loss, plan_chunks(p.B, p.M, p.D, sizeof(T), loss), gpu);
}

#define XBN_OF(T, S)                                                                                            \
  template void check_way(const MemoryLossParams<T, S>&, const LossSpec&, const Gpu&);                          \
  template int memory_loss(const MemoryLossParams<T, S>&, const LossSpec&, const Gpu&);                         \
  template int memory_sums(const MemorySumsParams<T, S>&, const LossSpec&, const Gpu&);                         \
  template int transform_memory_loss(const TransformParams<S>&, const MemoryLossParams<T, S>&, const LossSpec&, \
                                     const Gpu&);
#define XBN_INSTANTIATE(S, ...) XBN_OF(float, S) XBN_OF(double, S)
XBN_FOR_EACH_BANK(XBN_INSTANTIATE)
#undef XBN_INSTANTIATE
#undef XBN_OF

}  // namespace xbn::cuda
