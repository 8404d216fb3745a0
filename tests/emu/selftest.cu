// Kernels that try the stand-in for <cuda_runtime.h>, some of them wrong on purpose. Runs the cases named on the
// command line: sound cases check their own results; the wrong ones leave it to tests/test_emu.py to see that they were
// caught.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

// Where this file is compiled once more, with main renamed so.
[[gnu::weak]] int second_main(int argc, char** argv);

namespace {

constexpr int kThreads = 128;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

std::vector<float> counting(int n) {
  std::vector<float> values(n);
  std::iota(values.begin(), values.end(), 1.f);
  return values;
}

// ---- sound kernels ----

__global__ void write_indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(1000 * block + thread);
}

void indices() {
  const dim3 grid(2, 3, 2), block(5, 3, 4);
  std::vector<int> out(12 * 60);
  CHECK(launch(write_indices, grid, block, out.data()) == cudaSuccess);
  for (int i = 0; i < 12 * 60; ++i) CHECK(out[i] == 1000 * (i / 60) + i % 60);
}

enum class Wrong { kNothing, kNoBarrier, kNoFence, kNoWriterFence, kNoReaderFence };

template <Wrong kWrong>
__device__ float block_sum(float value) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    if (kWrong != Wrong::kNoBarrier || half != 8) __syncthreads();
  }
  const float sum = partial[0];
  __syncthreads();
  return sum;
}

template <Wrong kWrong>
__global__ void __launch_bounds__(kThreads) sum_blocks(const float* __restrict__ in, float* __restrict__ out) {
  const float sum = block_sum<kWrong>(__ldg(in + blockIdx.x * kThreads + threadIdx.x));
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

void sums() {
  const std::vector<float> in = counting(5 * kThreads);
  std::vector<float> out(5);
  CHECK(launch(sum_blocks<Wrong::kNothing>, 5, kThreads, in.data(), out.data()) == cudaSuccess);
  for (int b = 0; b < 5; ++b) CHECK(out[b] == kThreads * (b * kThreads + (kThreads + 1) / 2.f));
}

// The last block to finish adds up what all blocks wrote. Two ways to place the fences: by every thread, or by one
// thread between two barriers.
template <bool kEveryThread, Wrong kWrong>
__global__ void sum_grid(const float* in, float* partial, unsigned* ticket, float* out) {
  constexpr bool kWriterFence = kWrong == Wrong::kNothing || kWrong == Wrong::kNoReaderFence;
  constexpr bool kReaderFence = kWrong == Wrong::kNothing || kWrong == Wrong::kNoWriterFence;
  __shared__ bool last;
  const float mine = in[blockIdx.x * kThreads + threadIdx.x];
  partial[blockIdx.x * kThreads + threadIdx.x] = mine;
  if (kEveryThread && kWriterFence) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!kEveryThread && kWriterFence) __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if (!kEveryThread && kReaderFence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (kEveryThread && kReaderFence) __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * kThreads + kThreads - 1 - threadIdx.x];
  sum = block_sum<Wrong::kNothing>(sum);
  if (threadIdx.x == 0) *out = sum;
}

template <bool kEveryThread, Wrong kWrong>
void sum_of_grid() {
  const int blocks = 7, n = blocks * kThreads;
  const std::vector<float> in = counting(n);
  std::vector<float> partial(n);
  unsigned ticket = 0;
  for (int launches = 0; launches < 3; ++launches) {  // each leaves the ticket as it was
    float out = 0;
    CHECK(launch(sum_grid<kEveryThread, kWrong>, blocks, kThreads, in.data(), partial.data(), &ticket, &out) ==
          cudaSuccess);
    CHECK(out == n * (n + 1) / 2.f && ticket == 0);
  }
}

__global__ void exchange(float* sums, int* out) {
  const int lane = threadIdx.x % warpSize;
  float sum = static_cast<float>(lane);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  sums[threadIdx.x] = sum;
  int ok = __shfl_sync(0xffffffffu, lane, 5) == 5;
  ok &= __shfl_sync(0xffffffffu, lane, 3, 8) == (lane & ~7) + 3;
  ok &= __shfl_down_sync(0xffffffffu, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane);
  ok &= __shfl_up_sync(0xffffffffu, lane, 3, 16) == (lane % 16 >= 3 ? lane - 3 : lane);
  ok &= __shfl_xor_sync(0xffffffffu, lane * 0.5, 1) == (lane ^ 1) * 0.5;
  const float2 pair = __shfl_sync(0xffffffffu, make_float2(lane, -lane), 31);
  ok &= pair.x == 31 && pair.y == -31;
  if (lane < 10) {  // two groups of one warp at different intrinsics at once
    ok &= __ballot_sync(0x3ff, lane % 2) == 0x2aa;
    ok &= std::isnan(__shfl_sync(0x3ff, 1.f, 20));
  } else {
    ok &= __any_sync(~0x3ffu, lane == 12) && !__all_sync(~0x3ffu, lane == 12) && !__any_sync(~0x3ffu, lane > 40);
    ok &= __all_sync(~0x3ffu, lane >= 10);
  }
  out[threadIdx.x] = ok;
}

void warps() {
  float sums[96];
  int ok[96];
  CHECK(launch(exchange, 1, 96, sums, ok) == cudaSuccess);
  for (int i = 0; i < 96; ++i) CHECK(sums[i] == 31 * 16 && ok[i]);
}

__global__ void vote(int* out) {
  const int i = threadIdx.x;
  int ok = __syncthreads_count(i % 3 == 0) == (static_cast<int>(blockDim.x) + 2) / 3;
  ok &= __syncthreads_or(i == 7) != 0;
  ok &= __syncthreads_or(i > 5000) == 0;
  ok &= __syncthreads_and(i < 5000) != 0;
  ok &= __syncthreads_and(i != 7) == 0;
  out[i] = ok;
}

void votes() {
  std::vector<int> ok(1024);
  CHECK(launch(vote, 1, 1024, ok.data()) == cudaSuccess);
  for (int i = 0; i < 1024; ++i) CHECK(ok[i]);
}

__global__ void pass_through_warp(const float* in, float* out) {
  __shared__ float row[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 20; ++i) {
    row[warp][lane] = in[threadIdx.x] + i;
    __syncwarp();
    out[threadIdx.x] += row[warp][31 - lane];
    __syncwarp();
  }
}

void warp_order() {
  const std::vector<float> in = counting(64);
  std::vector<float> out(64);
  CHECK(launch(pass_through_warp, 1, 64, in.data(), out.data()) == cudaSuccess);
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 20 * in[i ^ 31] + 190);
}

__global__ void return_early(int* out, int stay) {
  if (static_cast<int>(threadIdx.x) >= stay) return;
  out[threadIdx.x] = __syncthreads_count(1);
  __syncwarp();
  __syncthreads();
}

void early_exits() {
  int out[80] = {};
  CHECK(launch(return_early, 1, 80, out, 37) == cudaSuccess);
  for (int i = 0; i < 80; ++i) CHECK(out[i] == (i < 37 ? 37 : 0));
}

struct Totals {
  int i;
  unsigned u, turns, bits;
  unsigned long long l;
  float f;
  double d;
  int top;
};

__global__ void accumulate(Totals* t) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&t->i, -i);
  atomicAdd(&t->u, 2);
  atomicAdd(&t->l, 1ull << 33);
  atomicAdd(&t->f, 0.5f);
  atomicAdd(&t->d, 0.25);
  atomicInc(&t->turns, 9);
  atomicOr(&t->bits, 1u << (i % 32));
  atomicMax(&t->top, i);
}

void atomics() {
  Totals t{};
  t.top = -5;
  CHECK(launch(accumulate, 3, 40, &t) == cudaSuccess);
  CHECK(t.i == -119 * 60 && t.u == 240 && t.l == 120ull << 33 && t.f == 60 && t.d == 30);
  CHECK(t.turns == 0 && t.bits == ~0u && t.top == 119);
}

__global__ void compute(float* out) {
  alignas(16) __shared__ float4 quad;
  if (threadIdx.x == 0) quad = make_float4(1, 2, 3, 4);
  __syncthreads();
  const float4 q = quad;
  out[0] = rsqrtf(q.w) + fmaf(q.x, q.y, q.z) + __fmaf_rn(q.x, q.y, q.z);
  out[1] = static_cast<float>(__popc(0xf0f0) + __ffs(8) + __clz(1));
  out[2] = __int_as_float(__float_as_int(q.z)) + __uint_as_float(__float_as_uint(q.w));
}

void functions() {
  float out[3];
  CHECK(launch(compute, 1, 1, out) == cudaSuccess);
  CHECK(out[0] == 10.5f && out[1] == 8 + 4 + 31 && out[2] == 7);
}

__global__ void read_uninitialised(float* out, int write) {
  __shared__ float row[kThreads];
  if (write) row[threadIdx.x] = 1;
  out[blockIdx.x * kThreads + threadIdx.x] = row[threadIdx.x];
}

void uninitialised() {
  std::vector<float> out(2 * kThreads);
  CHECK(launch(read_uninitialised, 2, kThreads, out.data(), 1) == cudaSuccess);
  for (const float v : out) CHECK(v == 1);
  CHECK(launch(read_uninitialised, 2, kThreads, out.data(), 0) == cudaSuccess);  // not what the last launch left there
  for (const float v : out) CHECK(std::isnan(v));
}

__global__ void reverse(const float* in, float* out, int n) {
  float* row = static_cast<float*>(emu::executor.dynamic_shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) row[i] = in[i];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = row[kThreads - 1 - i];  // of blocks that write less, NaN
}

void dynamic_memory() {
  const std::vector<float> in = counting(kThreads);
  std::vector<float> out(2 * kThreads);
  cudaLaunchConfig_t config{};
  config.gridDim = 2, config.blockDim = kThreads, config.dynamicSmemBytes = kThreads * sizeof(float);
  CHECK(cudaLaunchKernelEx(&config, reverse, in.data(), out.data(), kThreads) == cudaSuccess);
  for (int i = 0; i < 2 * kThreads; ++i) CHECK(out[i] == static_cast<float>(kThreads - i % kThreads));
  CHECK(cudaLaunchKernelEx(&config, reverse, in.data(), out.data(), 5) == cudaSuccess);
  for (int i = 0; i < 2 * kThreads; ++i) CHECK(std::isnan(out[i]) == (i % kThreads < kThreads - 5));
}

// Each lane's share of c = a b, all in the order of the instruction's documentation.
__global__ void multiply_halves(const float* a, const float* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const auto two = [](const float* matrix, int columns, int i, int k, bool across) {
    const auto at = [&](int d) { return across ? matrix[(k + d) * columns + i] : matrix[i * columns + k + d]; };
    return cvt_rn_f16x2_f32(at(1), at(0));
  };
  const uint4 left = make_uint4(two(a, 16, g, 2 * t, false), two(a, 16, g + 8, 2 * t, false),
                                two(a, 16, g, 2 * t + 8, false), two(a, 16, g + 8, 2 * t + 8, false));
  const uint2 right = make_uint2(two(b, 8, g, 2 * t, true), two(b, 8, g, 2 * t + 8, true));
  float sum[4];
  for (int e = 0; e < 4; ++e) sum[e] = c[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  mma_m16n8k16_f16(sum, left, right);
  for (int e = 0; e < 4; ++e) c[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
}

void halves() {
  CHECK(cvt_rn_f16x2_f32(1, -2) == 0x3c00c000u && cvt_rn_f16x2_f32(65520, 65519) == 0x7c007bffu);
  CHECK(cvt_rn_f16x2_f32(0x1p-24f, 0x1p-25f) == 0x00010000u && cvt_rn_f16x2_f32(0x1.8p-24f, 2049) == 0x00026800u);
  std::vector<float> a(16 * 16), b(16 * 8), c(16 * 8);
  const auto product = [&] { CHECK(launch(multiply_halves, 1, 32, a.data(), b.data(), c.data()) == cudaSuccess); };
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i % 19 - 9);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i % 23 - 11), c[i] = static_cast<float>(i);
  product();
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = static_cast<float>(8 * i + j);
      for (int k = 0; k < 16; ++k) sum += a[16 * i + k] * b[8 * k + j];
      CHECK(c[8 * i + j] == sum);
    }
  // What lies below the last of 24 bits of the largest is cut off, from each of the products and from their sum.
  const auto sum_of = [&](std::initializer_list<float> products, float so_far) {
    std::fill(a.begin(), a.end(), 0.0f);
    std::fill(b.begin(), b.end(), 1.0f);
    std::copy(products.begin(), products.end(), a.begin());
    c[0] = so_far;
    product();
    return c[0];
  };
  CHECK(sum_of({0x1p-23f, 0x1p-23f}, 1) == 1 + 0x1p-22f);
  CHECK(sum_of({0x1p-24f, 0x1p-24f, 0x1p-24f}, 1) == 1);
  CHECK(sum_of({-0x1p-24f}, 1) == 1 && sum_of({-0x1p-24f}, -1) == -1);
  CHECK(sum_of({1, 1}, 0x1p-23f) == 2);
  CHECK(sum_of({1, -1}, 0x1p-24f) == 0 && sum_of({}, 0x1p-24f) == 0x1p-24f);
  CHECK(std::isnan(sum_of({INFINITY, -INFINITY}, 0)) && sum_of({-INFINITY}, 5) == -INFINITY);
  CHECK(std::isnan(sum_of({NAN}, 5)) && std::isnan(sum_of({}, NAN)));
}

__global__ void shift(const float* in, float* out) {
  out[threadIdx.x + blockIdx.x * blockDim.x] = in[(threadIdx.x + 1 + blockIdx.x * blockDim.x) % (4 * blockDim.x)];
}

void launches_in_order() {
  std::vector<float> a = counting(4 * kThreads), b(4 * kThreads);
  for (int i = 0; i < 4; ++i) {
    CHECK(launch(shift, 4, kThreads, a.data(), b.data()) == cudaSuccess);
    CHECK(cudaMemsetAsync(a.data(), 0, a.size() * sizeof(float), nullptr) == cudaSuccess);
    std::swap(a, b);
  }
  CHECK(a[0] == 5 && a.back() == 4);
}

__global__ void record_order(int* blocks, int* threads, int* count) {
  const int i = atomicAdd(count, 1);
  blocks[i] = static_cast<int>(blockIdx.x);
  threads[i] = static_cast<int>(threadIdx.x);
}

void order() {
  const int n = 4 * 64;
  std::vector<int> blocks(n), threads(n), in_order(n);
  int count = 0;
  CHECK(launch(record_order, 4, 64, blocks.data(), threads.data(), &count) == cudaSuccess);
  bool sorted = true;
  for (int i = 0; i < n; ++i) {
    sorted &= blocks[i] == i / 64 && threads[i] == i % 64;
    ++in_order[blocks[i] * 64 + threads[i]];
  }
  for (int i = 0; i < n; ++i) CHECK(in_order[i] == 1);
  CHECK(sorted == (emu::settings().seed == 0));
}

__global__ void nothing() {}

void host_interface() {
  const auto launches = emu::settings().launches;
  CHECK(launch(nothing, 1, 1024) == cudaSuccess && emu::settings().launches == launches + 1);
  CHECK(launch(nothing, 1, 1025) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 0, 32) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1, 65536), 32) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, dim3(1, 1, 65)) == cudaErrorInvalidConfiguration);
  CHECK(emu::settings().launches == launches + 1);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
  CHECK(std::strstr(cudaGetErrorString(cudaErrorInvalidConfiguration), "configuration"));
  cudaLaunchConfig_t dynamic{};
  dynamic.gridDim = dynamic.blockDim = 1;
  dynamic.dynamicSmemBytes = (48 << 10) + 4;
  CHECK(cudaLaunchKernelEx(&dynamic, nothing) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) == cudaErrorInvalidValue);
  CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 49 << 10) == cudaSuccess);
  CHECK(cudaLaunchKernelEx(&dynamic, nothing) == cudaSuccess && cudaGetLastError() == cudaErrorInvalidValue);
  int device = -1, processors = 0;
  CHECK(cudaSetDevice(0) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 0);
  emu::settings().multiprocessors = 3;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && processors == 3);
}

__global__ void multiply(const float* in, float* out, int rounds) {
  __shared__ float tile[256];
  float sum = 0;
  for (int r = 0; r < rounds; ++r) {
    tile[threadIdx.x] = in[threadIdx.x] + static_cast<float>(r);
    __syncthreads();
    for (int k = 0; k < 256; ++k) sum += tile[k] * 0.5f;
    __syncthreads();
  }
  out[blockIdx.x * 256 + threadIdx.x] = sum;
}

void many_blocks() {
  const std::vector<float> in = counting(256);
  const int blocks = emu::kRaceDetection ? 10 : 500;
  std::vector<float> out(blocks * 256);
  CHECK(launch(multiply, blocks, 256, in.data(), out.data(), 4) == cudaSuccess);
  for (const float sum : out) CHECK(sum == 4 * 0.5f * (256 * 257 / 2) + 0.5f * 256 * 6);
}

// ---- wrong kernels ----

__global__ void reuse_too_early(const float* in, float* out) {
  __shared__ float row[kThreads];
  for (int i = 0; i < 3; ++i) {
    row[threadIdx.x] = in[threadIdx.x] + static_cast<float>(i);
    __syncthreads();
    out[threadIdx.x] += row[(threadIdx.x + 1) % kThreads];  // must be followed by a barrier
  }
}

// The warps must not run ahead of one another: __syncwarp() orders the lanes of each alone.
__global__ void order_warps_by_syncwarp(float* out) {
  __shared__ float row[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  row[warp][lane] = 1;
  __syncwarp();
  out[threadIdx.x] = row[1 - warp][lane];
}

__global__ void skip_syncwarp(float* out) {
  __shared__ float row[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
  row[warp][lane] = 1;
  out[threadIdx.x] = row[warp][lane ^ 1];
}

__global__ void order_by_shuffle(float* out) {
  __shared__ float row[32];
  row[threadIdx.x] = 1;
  __shfl_sync(0xffffffffu, 0, 0);  // does not order memory, as __syncwarp() does
  out[threadIdx.x] = row[31 - threadIdx.x];
}

__global__ void read_next_block(float* data) {
  const float next = data[(blockIdx.x + 1) % gridDim.x];
  if (threadIdx.x == 0) data[blockIdx.x] = next + 1;
}

__global__ void overrun(float* out) {
  __shared__ float row[kThreads];
  row[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

[[gnu::noinline]] __device__ void store(float* where) { *where = 1; }

__global__ void overrun_by_pointer(float* out) {
  __shared__ float row[kThreads];
  store(row + 1 + threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void overrun_dynamically(float* out) {
  float* row = static_cast<float*>(emu::executor.dynamic_shared_memory());
  row[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void race_dynamically(float* out) {
  float* row = static_cast<float*>(emu::executor.dynamic_shared_memory());
  row[threadIdx.x] = 1;
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

void launch_dynamically(void (*kernel)(float*), float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = 2, config.blockDim = kThreads, config.dynamicSmemBytes = kThreads * sizeof(float);
  cudaLaunchKernelEx(&config, kernel, out);
}

__global__ void diverge() {
  if (threadIdx.x < 5) {
    __syncthreads();  // one place
  } else {
    __syncthreads();  // the other place
  }
}

__global__ void lock_up() {
  if (threadIdx.x < 40) {
    __syncthreads();  // one place
  } else {
    __syncwarp();  // the other place
  }
}

__global__ void call_out_of_mask() {
  __shfl_sync(0xffffu, 1, 0);  // one place
}

template <class... Parameters>
void expect_exception(void (*kernel)(Parameters...)) {
  try {
    launch(kernel, dim3(1, 2), 64);
    std::puts("no exception");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
  sums();  // the next launch works as before
}

struct Case {
  const char* name;
  void (*run)();
};

float data[8 * kThreads];

const Case kSound[] = {
    {"indices", indices},
    {"sums", sums},
    {"sum_of_grid_every_thread", sum_of_grid<true, Wrong::kNothing>},
    {"sum_of_grid_one_thread", sum_of_grid<false, Wrong::kNothing>},
    {"warps", warps},
    {"votes", votes},
    {"warp_order", warp_order},
    {"early_exits", early_exits},
    {"atomics", atomics},
    {"functions", functions},
    {"uninitialised", uninitialised},
    {"dynamic_memory", dynamic_memory},
    {"halves", halves},
    {"launches_in_order", launches_in_order},
    {"order", order},
    {"host_interface", host_interface},
    {"many_blocks", many_blocks},
};

const Case kWrong[] = {
    {"no_barrier", [] { launch(sum_blocks<Wrong::kNoBarrier>, 2, kThreads, data, data + 4 * kThreads); }},
    {"reuse_too_early", [] { launch(reuse_too_early, 1, kThreads, data, data + kThreads); }},
    {"order_warps_by_syncwarp", [] { launch(order_warps_by_syncwarp, 1, 64, data); }},
    {"skip_syncwarp", [] { launch(skip_syncwarp, 1, 64, data); }},
    {"order_by_shuffle", [] { launch(order_by_shuffle, 1, 32, data); }},
    {"read_next_block", [] { launch(read_next_block, 2, 32, data); }},
    {"no_fence_every_thread", sum_of_grid<true, Wrong::kNoFence>},
    {"no_fence_one_thread", sum_of_grid<false, Wrong::kNoFence>},
    {"no_writer_fence_every_thread", sum_of_grid<true, Wrong::kNoWriterFence>},
    {"no_writer_fence_one_thread", sum_of_grid<false, Wrong::kNoWriterFence>},
    {"no_reader_fence_every_thread", sum_of_grid<true, Wrong::kNoReaderFence>},
    {"no_reader_fence_one_thread", sum_of_grid<false, Wrong::kNoReaderFence>},
    {"overrun", [] { launch(overrun, 1, kThreads, data); }},
    {"overrun_by_pointer", [] { launch(overrun_by_pointer, 1, kThreads, data); }},
    {"overrun_dynamically", [] { launch_dynamically(overrun_dynamically, data); }},
    {"race_dynamically", [] { launch_dynamically(race_dynamically, data); }},
    {"diverge", [] { expect_exception(diverge); }},
    {"lock_up", [] { expect_exception(lock_up); }},
    {"call_out_of_mask", [] { expect_exception(call_out_of_mask); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "second") == 0) return second_main(argc - 1, argv + 1);
  if (argc != 3 && argc != 4) {
    std::puts("usage: selftest [second] CASE|sound SEED [IDENTITIES_OF_WARP]");
    return 2;
  }
  emu::settings().seed = std::strtoull(argv[2], nullptr, 10);
  if (argc == 4) emu::settings().identities_of_warp = static_cast<unsigned>(std::atoi(argv[3]));
  const bool all = std::strcmp(argv[1], "sound") == 0;
  for (const Case& c : kSound) {
    if (!all && std::strcmp(argv[1], c.name) != 0) continue;
    c.run();
    std::printf("%s done\n", c.name);
  }
  for (const Case& c : kWrong) {
    if (std::strcmp(argv[1], c.name) != 0) continue;
    c.run();
    std::printf("%s done\n", c.name);
  }
  return 0;
}
