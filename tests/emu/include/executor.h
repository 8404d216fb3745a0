// Runs CUDA kernels on the CPU: the CUDA threads of a block are fibers on the calling OS thread, and blocks run one
// after the other. A fiber runs until it waits for other threads at a barrier or in a warp intrinsic, or returns; it
// then goes over to one that is ready, most often of its own warp.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device_types.h"
#include "fiber.h"
#include "happens_before.h"
#include "shared_memory.h"

namespace [[gnu::visibility("hidden")]] emu {

struct Settings {
  std::uint64_t seed = 0;         // 0: blocks and threads in order of index; else the order is drawn from it
  int multiprocessors = 4;        // cudaDevAttrMultiProcessorCount
  int shared_memory = 227 << 10;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
  std::uint64_t launches = 0;     // counts the launches of kernels
  std::uint64_t products = 0;     // and those of library products
  int launch_error = 0;           // a cudaError_t that every launch fails with; 0: none
  // Under ThreadSanitizer, what a barrier takes grows with the square of the number of threads it knows of. With fewer
  // than a warp has lanes, each launch deals the lanes to them again, and a race of two lanes that got the same one
  // goes unseen. A race between warps never does.
  unsigned identities_of_warp = 32;
};
inline Settings global_settings;
inline Settings& settings() { return global_settings; }

using Place = std::source_location;

// A kernel with its arguments.
struct Kernel {
  const void* function;
  void (*run)(const void* arguments);
  const void* arguments;
  std::size_t dynamic_bytes;  // of shared memory in each block
};

constexpr unsigned kMaxThreads = 1024, kLanes = 32, kMaxWarps = kMaxThreads / kLanes;

class RandomNumbers {  // splitmix64
 public:
  explicit RandomNumbers(std::uint64_t seed = 0) : state_(seed) {}
  EMU_HOT std::uint32_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<std::uint32_t>(z >> 32);
  }
  EMU_HOT std::uint64_t below(std::uint64_t bound) { return (next() * bound) >> 32; }  // bound <= 2^32

 private:
  std::uint64_t state_;
};

// One of the bits that are set.
EMU_HOT unsigned pick(unsigned bits, unsigned random) {
  return static_cast<unsigned>(__builtin_ctz(std::rotr(bits, static_cast<int>(random % 32))) + random) % 32;
}

struct Thread {
  void* stack_pointer;
  Identity identity;
  uint3 index;
  unsigned lane, warp;
  bool returned;
  Place place;           // of the barrier or warp intrinsic that it waits in
  std::uint64_t offer;   // what it brings to a warp intrinsic,
  unsigned source_lane;  // which lane's offer it asks for,
  std::uint64_t answer;  // and what it gets
  unsigned products;     // that it has taken part in
};

enum class WarpOp : std::uint8_t { kSync, kShuffle, kBallot };

// Lanes of a warp that wait for each other in one intrinsic.
struct Meeting {
  unsigned mask, came;
  WarpOp op;
  Place place;
};

// A product of matrices: what the lanes of a warp bring to it, and what they get. Of eight columns, or of sixteen.
using Row = float __attribute__((vector_size(32)));
struct Product {
  float a[16][16];
  Row b[16], c[16];
  unsigned done;  // the number of the product that c is the result of
};

// sum + a b as a tensor core adds up, at its least exact: each of the 16 products, and the sum so far, is brought to
// the exponent of the largest and cut off there behind 24 bits; and so is their sum, at its own.
EMU_HOT void add_cut_off(Row& sum, const float (&a)[16], const Row (&b)[16]) {
  using Bits = std::uint32_t __attribute__((vector_size(32)));
  using Whole = std::int32_t __attribute__((vector_size(32)));
  using Doubles = double __attribute__((vector_size(64)));
  using DoubleBits = std::uint64_t __attribute__((vector_size(64)));
  constexpr std::uint32_t kSign = 0x80000000u, kExponent = 0x7f800000u, kLeast = 60u << 23;
  Row product[16], exact = sum;
  Bits largest = __builtin_bit_cast(Bits, sum) & ~kSign;
  for (int k = 0; k < 16; ++k) {
    product[k] = a[k] * b[k];  // exact: of two numbers of 11 bits
    exact += product[k];
    const Bits here = __builtin_bit_cast(Bits, product[k]) & ~kSign;
    largest = largest > here ? largest : here;
  }
  const Bits exponent = (largest > kLeast ? largest : largest * 0 + kLeast) & kExponent;
  const Row unit = __builtin_bit_cast(Row, exponent - (23u << 23));            // of the last bit that stays
  const Row shift = __builtin_bit_cast(Row, ((254u + 23u) << 23) - exponent);  // 1 / unit
  // Of either sign; added up without one, since what stands for an infinity may overflow.
  Bits whole = __builtin_bit_cast(Bits, __builtin_convertvector(sum * shift, Whole));
  for (int k = 0; k < 16; ++k) whole += __builtin_bit_cast(Bits, __builtin_convertvector(product[k] * shift, Whole));
  const Doubles wide = __builtin_convertvector(__builtin_bit_cast(Whole, whole), Doubles);
  const Doubles cut = __builtin_bit_cast(Doubles, __builtin_bit_cast(DoubleBits, wide) & ~std::uint64_t{0x1fffffff});
  const Row result = __builtin_convertvector(cut, Row) * unit;
  sum = (exact * 0 == exact * 0) ? result : exact;  // not where there is an infinity or a NaN
}

// Sets of lanes are bit masks.
struct Warp {
  // A meeting lives in the entry of the lane that came first, which cannot be at two meetings.
  Meeting meetings[kLanes];
  unsigned open;        // the entries in use
  unsigned live;        // lanes that have not returned,
  unsigned ready;       // that can go on,
  unsigned at_barrier;  // and that wait at the block's barrier
  Product products[2];  // one and the next, which a lane may come to while others still have to take their part of this
};

struct Barrier {
  unsigned arrived, votes;
  unsigned answer;  // the votes of the last one, which every thread has left before the next is complete
  Place place;
};

enum class Failure : std::uint8_t { kNone, kDivergent, kLaneNotInMask };

class Executor {
 public:
  // Called by the host. Throws std::runtime_error if the threads of a block cannot go on.
  void launch(dim3 grid, dim3 block, Kernel kernel) {
    const std::lock_guard lock(mutex_);
    ++settings().launches;
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    kernel_ = kernel;
    gridDim = grid;
    blockDim = block;
    threads_in_block_ = block.x * block.y * block.z;
    shuffled_ = settings().seed != 0;
    random_ = RandomNumbers(settings().seed);
    provide_threads(blocks);
    if (!shared_memory_) shared_memory_.emplace();
    shared_memory_->belongs_to(kernel.function);
    // Of exactly that size, for AddressSanitizer to see what lies beyond.
    dynamic_memory_.reset(kernel.dynamic_bytes == 0 ? nullptr : static_cast<char*>(std::malloc(kernel.dynamic_bytes)));

    release(&launch_begin_);
    by_all(&acquire, &launch_begin_);
    std::vector<std::uint64_t> order;
    if (shuffled_) {
      for (std::uint64_t i = 0; i < blocks; ++i) order.push_back(i);
      for (std::uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (std::uint64_t i = 0; i < blocks; ++i) run_block(shuffled_ ? order[i] : i, i % sets_);
    end_launch();
  }

  // The rest is called by CUDA threads.

  // A barrier of all threads of the block that have not returned. Counts the threads with a true predicate.
  EMU_UNINSTRUMENTED unsigned meet_block(bool vote, Place place) {
    Thread& self = *current_;
    if (barrier_.arrived == 0) {
      barrier_.place = place;
      barrier_.votes = 0;
    } else if (!same(barrier_.place, place)) {
      fail(Failure::kDivergent, place, barrier_.place);
    }
    barrier_.votes += vote;
    ++barrier_.arrived;
    warps_[self.warp].at_barrier |= 1u << self.lane;
    self.place = place;
    if (barrier_.arrived == live_) end_barrier();
    go_on();
    return barrier_.answer;
  }

  // A warp intrinsic of the lanes in `mask` that have not returned. Only kSync orders memory.
  EMU_UNINSTRUMENTED std::uint64_t meet_warp(WarpOp op, unsigned mask, std::uint64_t offer, unsigned source_lane,
                                             Place place) {
    Thread& self = *current_;
    Warp& warp = warps_[self.warp];
    const unsigned bit = 1u << self.lane;
    if (!(mask & bit)) fail(Failure::kLaneNotInMask, place, place);
    Meeting* meeting = find_meeting(warp, mask);
    if (!meeting) {
      meeting = &warp.meetings[self.lane];
      warp.open |= bit;
      *meeting = {mask, 0, op, place};
    } else if (!same(meeting->place, place)) {
      fail(Failure::kDivergent, place, meeting->place);
    }
    meeting->came |= bit;
    self.place = place;
    self.offer = offer;
    self.source_lane = source_lane;
    if (meeting->came == (meeting->mask & warp.live)) end_meeting(self.warp, *meeting);
    go_on();
    return self.answer;
  }

  // An atomic operation publishes what its thread has done, or learned at barriers, if its block has fenced before: a
  // fence that comes after it is too late for a thread that sees it. A fence learns what was published, once its block
  // has had an atomic operation that may have seen another's.
  EMU_UNINSTRUMENTED void fence() {
    if (atomics_seen_) acquire(&fence_);
    fenced_ = true;
  }
  EMU_UNINSTRUMENTED void fence_block() {
    if (atomics_seen_) acquire(&block_fence_);
    release(&block_fence_);
  }
  EMU_UNINSTRUMENTED void note_atomic() {
    if (fenced_) release(&fence_);
    atomics_seen_ = true;
  }

  // The tensor cores' c += a b, by all lanes of a warp. Orders no memory. m16n8k8, of a and b the first 19 bits count:
  EMU_UNINSTRUMENTED void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2], Place place) {
    Thread& self = *current_;
    const unsigned number = ++self.products, g = self.lane / 4, t = self.lane % 4;
    Product& all = warps_[self.warp].products[number % 2];
    for (unsigned e = 0; e < 4; ++e) {
      all.a[g + e % 2 * 8][t + e / 2 * 4] = cut_off(a[e]);
      all.c[g + e / 2 * 8][2 * t + e % 2] = c[e];
    }
    for (unsigned e = 0; e < 2; ++e) all.b[t + e * 4][g] = cut_off(b[e]);
    meet_warp(WarpOp::kBallot, ~0u, 0, 0, place);
    if (all.done != number) {  // the first to go on
      for (unsigned i = 0; i < 16; ++i)
        for (unsigned k = 0; k < 8; ++k) all.c[i] += all.a[i][k] * all.b[k];
      all.done = number;
    }
    for (unsigned e = 0; e < 4; ++e) c[e] = all.c[g + e / 2 * 8][2 * t + e % 2];
  }

  // And m16n8k16, of fp16: each 32 bits are two neighbouring columns.
  EMU_UNINSTRUMENTED void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                   Place place) {
    Thread& self = *current_;
    const unsigned number = ++self.products, g = self.lane / 4, t = self.lane % 4;
    Product& all = warps_[self.warp].products[number % 2];
    for (unsigned e = 0; e < 4; ++e) {
      for (unsigned k = 0; k < 2; ++k) all.a[g + e % 2 * 8][2 * t + e / 2 * 8 + k] = half(a[e], k);
      all.c[g + e / 2 * 8][2 * t + e % 2] = c[e];
    }
    for (unsigned e = 0; e < 2; ++e)
      for (unsigned k = 0; k < 2; ++k) all.b[2 * t + e * 8 + k][g] = half(b[e], k);
    meet_warp(WarpOp::kBallot, ~0u, 0, 0, place);
    if (all.done != number) {  // the first to go on
      for (unsigned i = 0; i < 16; ++i) add_cut_off(all.c[i], all.a[i], all.b);
      all.done = number;
    }
    for (unsigned e = 0; e < 4; ++e) c[e] = all.c[g + e / 2 * 8][2 * t + e % 2];
  }

  EMU_UNINSTRUMENTED void* dynamic_shared_memory() const { return dynamic_memory_.get(); }

  EMU_UNINSTRUMENTED unsigned lane() const { return current_->lane; }

 private:
  EMU_HOT static float cut_off(float x) {
    return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, x) & 0xffffe000u);
  }

  EMU_HOT static float half(std::uint32_t two, unsigned which) {
    return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<std::uint16_t>(two >> 16 * which)));
  }

  // Blocks must not learn of one another from running as the same threads of ThreadSanitizer. Successive blocks
  // therefore run as different ones, on different stacks; only every sets_'th block shares them.
  void provide_threads(std::uint64_t blocks) {
    executor_ = this;
    sets_ = 1;
    if (!kRaceDetection) return stacks_.provide(threads_in_block_);

    const unsigned warps = (threads_in_block_ + kLanes - 1) / kLanes;
    const unsigned of_warp = std::clamp(settings().identities_of_warp, 1u, kLanes);
    RandomNumbers random(settings().seed ^ settings().launches << 32);
    for (unsigned i = 0; i < threads_in_block_; ++i) {
      const unsigned lane = i % kLanes, mine = of_warp == kLanes ? lane : random.below(of_warp);
      identity_of_[i] = static_cast<std::uint16_t>(i / kLanes * of_warp + mine);
    }
    identities_of_block_ = of_warp == kLanes ? threads_in_block_ : warps * of_warp;
    if (blocks > 1) {
      const unsigned most = std::min(std::clamp(512 / identities_of_block_, 2u, 4u), Stacks::kMost / threads_in_block_);
      sets_ = blocks < most ? static_cast<unsigned>(blocks) : most;
    }
    stacks_.provide(sets_ * threads_in_block_);
    for (; identities_ < sets_ * identities_of_block_; ++identities_) identity_[identities_] = new_identity();
  }

  // By every identity of this launch.
  EMU_UNINSTRUMENTED void by_all(void (*f)(void*), Order* order) {
    if (!kRaceDetection) return;
    const Identity host = present_identity();
    for (unsigned i = 0; i < sets_ * identities_of_block_; ++i) {
      become(identity_[i]);
      f(order);
    }
    become(host);
  }

  EMU_UNINSTRUMENTED void end_launch() {
    by_all(&release, &launch_end_);
    acquire(&launch_end_);
  }

  EMU_UNINSTRUMENTED void run_block(std::uint64_t block, unsigned set) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    shared_memory_->renew();
    if (dynamic_memory_ != nullptr) SharedMemory::renew(dynamic_memory_.get(), kernel_.dynamic_bytes);
    forget(&block_fence_, sizeof(Order));
    forget(&barrier_order_, sizeof(Order));
    const unsigned n = live_ = threads_in_block_;
    barrier_.arrived = 0;
    atomics_seen_ = fenced_ = false;
    failure_ = Failure::kNone;
    warps_ready_ = warp_ = 0;
    for (unsigned w = 0; w * kLanes < n; ++w) {
      const unsigned lanes = n - w * kLanes < kLanes ? (1u << (n - w * kLanes)) - 1 : ~0u;
      warps_[w].open = warps_[w].at_barrier = warps_[w].ready = 0;
      for (Product& product : warps_[w].products) product.done = 0;
      warps_[w].live = lanes;
      make_ready(w, lanes);
    }
    uint3 index{0, 0, 0};
    for (unsigned i = 0; i < n; ++i) {
      Thread& thread = threads_[i];
      thread.stack_pointer = stacks_.start(set * n + i, &Executor::thread_main);
      if (kRaceDetection) thread.identity = identity_[set * identities_of_block_ + identity_of_[i]];
      thread.index = index;
      thread.lane = i % kLanes;
      thread.warp = i / kLanes;
      thread.returned = false;
      thread.products = 0;
      if (++index.x == blockDim.x) {
        index.x = 0;
        if (++index.y == blockDim.y) index.y = 0, ++index.z;
      }
    }
    const Identity host = present_identity();
    Thread& first = take_ready();
    become(first.identity);
    stacks_.enter(first.stack_pointer);
    become(host);
    if (failure_ != Failure::kNone) give_up(describe_failure());
    if (live_ > 0) give_up(describe_deadlock());
  }

  EMU_UNINSTRUMENTED static void thread_main() { executor_->run_thread(); }

  EMU_UNINSTRUMENTED void run_thread() {
    stacks_.entered();
    kernel_.run(kernel_.arguments);
    Thread& self = *current_;
    self.returned = true;
    Warp& warp = warps_[self.warp];
    warp.live &= ~(1u << self.lane);
    --live_;
    if (live_ > 0 && barrier_.arrived == live_) end_barrier();
    for (unsigned open = warp.open; open; open &= open - 1) {
      Meeting& meeting = warp.meetings[__builtin_ctz(open)];
      if (meeting.came == (meeting.mask & warp.live)) end_meeting(self.warp, meeting);
    }
    go_on();
    __builtin_trap();
  }

  // Runs the threads that are ready, until it is this one's turn again.
  EMU_HOT void go_on() {
    Thread& self = *current_;
    if (warps_ready_ == 0) stacks_.leave();
    Thread& next = take_ready();
    if (&next == &self) return;
    if (kRaceDetection && next.identity != self.identity) become(next.identity);
    switch_stack(&self.stack_pointer, next.stack_pointer);
  }

  EMU_UNINSTRUMENTED void end_barrier() {
    barrier_.arrived = 0;
    barrier_.answer = barrier_.votes;
    unsigned waiting[kMaxWarps]{};
    for (unsigned w = 0; w * kLanes < threads_in_block_; ++w) {
      waiting[w] = warps_[w].at_barrier;
      if (waiting[w] == 0) continue;
      make_ready(w, waiting[w]);
      warps_[w].at_barrier = 0;
    }
    if (kRaceDetection) let_know_of_each_other(0, (threads_in_block_ + kLanes - 1) / kLanes, waiting, &barrier_order_);
  }

  EMU_HOT Meeting* find_meeting(Warp& warp, unsigned mask) {
    for (unsigned open = warp.open; open; open &= open - 1) {
      Meeting& meeting = warp.meetings[__builtin_ctz(open)];
      if (meeting.mask == mask) return &meeting;
    }
    return nullptr;
  }

  EMU_UNINSTRUMENTED void end_meeting(unsigned w, Meeting& meeting) {
    Warp& warp = warps_[w];
    Thread* const lanes = &threads_[w * kLanes];
    if (meeting.op == WarpOp::kBallot) {
      unsigned ballot = 0;
      for (unsigned came = meeting.came; came; came &= came - 1) {
        const unsigned lane = __builtin_ctz(came);
        ballot |= (lanes[lane].offer != 0 ? 1u : 0u) << lane;
      }
      for (unsigned came = meeting.came; came; came &= came - 1) lanes[__builtin_ctz(came)].answer = ballot;
    } else if (meeting.op == WarpOp::kShuffle) {
      for (unsigned came = meeting.came; came; came &= came - 1) {
        Thread& thread = lanes[__builtin_ctz(came)];
        const bool source_came = meeting.came >> thread.source_lane & 1;
        thread.answer = source_came ? lanes[thread.source_lane].offer : ~std::uint64_t{0};  // undefined on a GPU
      }
    } else if (kRaceDetection) {
      forget(&warp_order_, sizeof(Order));
      let_know_of_each_other(w, w + 1, &meeting.came, &warp_order_);
    }
    make_ready(w, meeting.came);
    warp.open &= ~(1u << (&meeting - warp.meetings));
  }

  // What any of the threads, lanes[0] of warp `first` and so on, has done is visible to all of them.
  EMU_UNINSTRUMENTED void let_know_of_each_other(unsigned first, unsigned last, const unsigned* lanes, Order* order) {
    Identity all[kMaxThreads];
    unsigned n = 0;
    for (unsigned w = first; w < last; ++w) {
      const unsigned begin = n;
      for (unsigned left = lanes[w - first]; left; left &= left - 1) {
        const Identity identity = threads_[w * kLanes + __builtin_ctz(left)].identity;
        unsigned k = begin;
        while (k < n && all[k] != identity) ++k;
        if (k == n) all[n++] = identity;
      }
    }
    for (unsigned i = 0; i < n; ++i) become(all[i]), release(order);
    for (unsigned i = 0; i < n; ++i) become(all[i]), acquire(order);
    become(current_->identity);
  }

  EMU_HOT void make_ready(unsigned warp, unsigned lanes) {
    warps_[warp].ready |= lanes;
    warps_ready_ |= 1u << warp;
  }

  // Takes a thread that is ready, which is now the current one: mostly of the warp that ran last, whose stacks are in
  // the cache, and in order of index if threads are not shuffled.
  EMU_HOT Thread& take_ready() {
    const unsigned random = shuffled_ ? random_.next() : 0;
    if (!(warps_ready_ >> warp_ & 1) || (shuffled_ && random >> 28 == 0)) warp_ = pick(warps_ready_, random >> 5);
    Warp& warp = warps_[warp_];
    const unsigned lane = pick(warp.ready, random);
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) warps_ready_ &= ~(1u << warp_);
    current_ = &threads_[warp_ * kLanes + lane];
    threadIdx = current_->index;
    return *current_;
  }

  // file_name() of one place may be two strings if two translation units saw it.
  EMU_HOT static bool same(const Place& a, const Place& b) {
    return __builtin_bit_cast(const void*, a) == __builtin_bit_cast(const void*, b) || equal(a, b);
  }
  EMU_UNINSTRUMENTED static bool equal(const Place& a, const Place& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
  }

  // Ends the launch from within a CUDA thread; the host composes the message, for this stack is not unwound.
  [[noreturn]] EMU_UNINSTRUMENTED void fail(Failure failure, Place here, Place others) {
    failure_ = failure;
    current_->place = here;
    others_place_ = others;
    stacks_.leave();
  }

  [[noreturn]] void give_up(const std::string& message) {
    end_launch();
    while (identities_ > 0) end_identity(identity_[--identities_]);  // their records of calls are not unwound, either
    throw std::runtime_error("block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                             std::to_string(blockIdx.z) + "): " + message);
  }

  std::string describe_failure() const {
    const std::string thread = "thread " + std::to_string(current_ - threads_);
    if (failure_ == Failure::kLaneNotInMask) {
      return thread + " is not in the mask of its warp intrinsic at " + describe(current_->place);
    }
    return "divergent barrier: " + thread + " came to " + describe(current_->place) + " while others wait at " +
           describe(others_place_);
  }

  std::string describe_deadlock() const {
    std::string message = "deadlock:";
    for (unsigned i = 0; i < threads_in_block_;) {
      unsigned end = i + 1;
      while (end < threads_in_block_ && threads_[end].returned == threads_[i].returned &&
             (threads_[i].returned || same(threads_[end].place, threads_[i].place))) {
        ++end;
      }
      message += (i == 0 ? " threads " : "; threads ") + std::to_string(i) + "-" + std::to_string(end - 1);
      message += threads_[i].returned ? " have returned" : " wait at " + describe(threads_[i].place);
      i = end;
    }
    return message;
  }

  static std::string describe(const Place& place) {
    return std::string(place.file_name()) + ":" + std::to_string(place.line());
  }

  std::mutex mutex_;  // launches from several host threads take turns
  static inline Executor* executor_;
  Stacks stacks_;
  unsigned sets_ = 1;
  unsigned identities_ = 0, identities_of_block_ = 0;
  Identity identity_[Stacks::kMost]{};        // [sets][of a block]
  std::uint16_t identity_of_[kMaxThreads]{};  // by thread of a block
  std::optional<SharedMemory> shared_memory_;
  std::unique_ptr<char, decltype(&std::free)> dynamic_memory_{nullptr, &std::free};
  Kernel kernel_{};
  bool shuffled_ = false;
  RandomNumbers random_;
  Order launch_begin_{}, launch_end_{}, fence_{}, block_fence_{}, barrier_order_{}, warp_order_{};

  // Of the block that runs.
  Thread* current_ = nullptr;
  unsigned threads_in_block_ = 0;
  unsigned live_ = 0;  // threads that have not returned
  Thread threads_[kMaxThreads]{};
  Warp warps_[kMaxWarps]{};
  Barrier barrier_{};
  bool atomics_seen_ = false, fenced_ = false;
  unsigned warps_ready_ = 0;  // a bit mask
  unsigned warp_ = 0;         // that ran last
  Failure failure_ = Failure::kNone;
  Place others_place_{};
};

inline Executor executor;

}  // namespace emu
