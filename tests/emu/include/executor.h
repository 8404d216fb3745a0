// Runs CUDA kernels on the CPU: the CUDA threads of a block are fibers on the calling OS thread, and blocks run one
// after the other. A fiber runs until it waits for other threads at a barrier or in a warp intrinsic, or returns.
#pragma once
#include <algorithm>
#include <cstdint>
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
  std::uint64_t seed = 0;      // 0: blocks and threads in order of index; else the order is drawn from it
  int multiprocessors = 4;     // cudaDevAttrMultiProcessorCount
  std::uint64_t launches = 0;  // counts the launches of kernels
  int launch_error = 0;        // a cudaError_t that every launch fails with; 0: none
};
inline Settings global_settings;
inline Settings& settings() { return global_settings; }

using Place = std::source_location;

// A kernel with its arguments.
struct Kernel {
  void (*run)(const void* arguments);
  const void* arguments;
};

constexpr unsigned kMaxThreads = 1024, kLanes = 32, kMaxWarps = kMaxThreads / kLanes;

class RandomNumbers {  // splitmix64
 public:
  explicit RandomNumbers(std::uint64_t seed = 0) : state_(seed) {}
  EMU_UNINSTRUMENTED std::uint64_t below(std::uint64_t bound) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (z ^ z >> 31) % bound;
  }

 private:
  std::uint64_t state_;
};

enum class State : std::uint8_t { kReady, kAtBarrier, kInWarp, kReturned };

struct Thread {
  Fiber* fiber;
  uint3 index;
  unsigned lane, warp;
  State state;
  Place place;           // of the barrier or warp intrinsic that it waits in
  std::uint64_t offer;   // what it brings to a warp intrinsic,
  unsigned source_lane;  // which lane's offer it asks for,
  std::uint64_t answer;  // and what it gets; for a barrier, the number of threads with a true predicate
};

enum class WarpOp : std::uint8_t { kSync, kShuffle, kBallot };

// Lanes of a warp that wait for each other in one intrinsic.
struct Meeting {
  unsigned mask, came;
  WarpOp op;
  Place place;
  Order* order;
};

struct Warp {
  // A meeting lives in the entry of the lane that came first, which cannot be at two meetings.
  Meeting meetings[kLanes];
  unsigned open;  // bit mask of the entries in use
  unsigned live;  // lanes that have not returned
  // Used in rotation: lanes may still have to acquire() the order of the last meeting while others form the next.
  Order orders[64];
  unsigned next_order;
};

struct Barrier {
  unsigned arrived, votes;
  Place place;
  Order orders[2];  // used in turn: all threads have left a barrier before the next but one is reached
  unsigned turn;
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
    provide_fibers(blocks);
    if (!shared_memory_) shared_memory_.emplace();

    release(&launch_begin_);
    std::vector<std::uint64_t> order;
    if (shuffled_) {
      for (std::uint64_t i = 0; i < blocks; ++i) order.push_back(i);
      for (std::uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (std::uint64_t i = 0; i < blocks; ++i) run_block(shuffled_ ? order[i] : i, i % fiber_sets_);
    acquire(&launch_end_);
  }

  // The rest is called by CUDA threads.

  // A barrier of all threads of the block that have not returned. Counts the threads with a true predicate.
  EMU_UNINSTRUMENTED unsigned meet_block(bool vote, Place place) {
    Thread& self = *current_;
    if (barrier_.arrived == 0) {
      barrier_.place = place;
      barrier_.votes = 0;
      barrier_.turn ^= 1;
      forget(&barrier_.orders[barrier_.turn], sizeof(Order));
    } else if (!same(barrier_.place, place)) {
      fail(Failure::kDivergent, place, barrier_.place);
    }
    Order* const order = &barrier_.orders[barrier_.turn];
    release(order);
    barrier_.votes += vote;
    ++barrier_.arrived;
    self.state = State::kAtBarrier;
    self.place = place;
    if (barrier_.arrived == live_) end_barrier();
    self.fiber->suspend();
    acquire(order);
    return static_cast<unsigned>(self.answer);
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
      *meeting = {mask, 0, op, place, nullptr};
      if (op == WarpOp::kSync) {
        meeting->order = &warp.orders[warp.next_order++ % std::size(warp.orders)];
        forget(meeting->order, sizeof(Order));
      }
    } else if (!same(meeting->place, place)) {
      fail(Failure::kDivergent, place, meeting->place);
    }
    Order* const order = meeting->order;
    if (order) release(order);
    meeting->came |= bit;
    self.state = State::kInWarp;
    self.place = place;
    self.offer = offer;
    self.source_lane = source_lane;
    if (meeting->came == (meeting->mask & warp.live)) end_meeting(self.warp, *meeting);
    self.fiber->suspend();
    if (order) acquire(order);
    return self.answer;
  }

  // An atomic operation publishes what its thread has done, or learned at barriers, if its block has fenced before: a
  // fence that comes after it is too late for whoever sees it. A fence learns what was published, once its block has
  // had an atomic operation that may have seen another's.
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

  EMU_UNINSTRUMENTED unsigned lane() const { return current_->lane; }

 private:
  // Blocks must not learn of one another from running on the same fibers. Under ThreadSanitizer successive blocks
  // therefore run on different fibers, with stacks of their own; only every fiber_sets_'th block shares them.
  void provide_fibers(std::uint64_t blocks) {
    fiber_sets_ = 1;
    if (kRaceDetection && blocks > 1) {
      const unsigned most = std::clamp(kMaxThreads / threads_in_block_, 2u, 8u);
      fiber_sets_ = blocks < most ? static_cast<unsigned>(blocks) : most;
    }
    while (fibers_.size() < std::size_t{fiber_sets_} * threads_in_block_) {
      fibers_.push_back(std::make_unique<Fiber>(fibers_.size()));
    }
  }

  EMU_UNINSTRUMENTED void run_block(std::uint64_t block, unsigned fiber_set) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    shared_memory_->renew();
    forget(&block_fence_, sizeof(Order));
    const unsigned n = live_ = threads_in_block_;
    barrier_.arrived = 0;
    atomics_seen_ = fenced_ = false;
    failure_ = Failure::kNone;
    ready_count_ = ready_head_ = 0;
    const std::unique_ptr<Fiber>* fibers = fibers_.data() + std::size_t{fiber_set} * n;
    for (unsigned w = 0; w * kLanes < n; ++w) warps_[w].open = warps_[w].live = 0;
    for (unsigned i = 0; i < n; ++i) {
      Thread& thread = threads_[i];
      thread.fiber = fibers[i].get();
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      thread.lane = i % kLanes;
      thread.warp = i / kLanes;
      warps_[thread.warp].live |= 1u << thread.lane;
      thread.fiber->start(&thread_main, this);
      make_ready(i);
    }
    while (ready_count_ > 0) {
      current_ = &threads_[take_ready()];
      threadIdx = current_->index;
      current_->fiber->resume();
      if (failure_ != Failure::kNone) give_up(describe_failure());
    }
    if (live_ > 0) give_up(describe_deadlock());
  }

  EMU_UNINSTRUMENTED static void thread_main(void* executor) { static_cast<Executor*>(executor)->run_thread(); }

  EMU_UNINSTRUMENTED void run_thread() {
    Thread& self = *current_;
    acquire(&launch_begin_);
    kernel_.run(kernel_.arguments);
    release(&launch_end_);
    self.state = State::kReturned;
    Warp& warp = warps_[self.warp];
    warp.live &= ~(1u << self.lane);
    --live_;
    if (live_ > 0 && barrier_.arrived == live_) end_barrier();
    for (unsigned open = warp.open; open; open &= open - 1) {
      Meeting& meeting = warp.meetings[__builtin_ctz(open)];
      if (meeting.came == (meeting.mask & warp.live)) end_meeting(self.warp, meeting);
    }
    self.fiber->finish();
  }

  EMU_UNINSTRUMENTED void end_barrier() {
    barrier_.arrived = 0;
    for (unsigned i = 0; i < threads_in_block_; ++i) {
      if (threads_[i].state != State::kAtBarrier) continue;
      threads_[i].answer = barrier_.votes;
      make_ready(i);
    }
  }

  EMU_UNINSTRUMENTED Meeting* find_meeting(Warp& warp, unsigned mask) {
    for (unsigned open = warp.open; open; open &= open - 1) {
      Meeting& meeting = warp.meetings[__builtin_ctz(open)];
      if (meeting.mask == mask) return &meeting;
    }
    return nullptr;
  }

  EMU_UNINSTRUMENTED void end_meeting(unsigned warp, Meeting& meeting) {
    Thread* const lanes = &threads_[warp * kLanes];
    unsigned ballot = 0;
    for (unsigned came = meeting.came; came; came &= came - 1) {
      const unsigned lane = __builtin_ctz(came);
      ballot |= (lanes[lane].offer != 0 ? 1u : 0u) << lane;
    }
    for (unsigned came = meeting.came; came; came &= came - 1) {
      Thread& thread = lanes[__builtin_ctz(came)];
      const bool source_came = meeting.came >> thread.source_lane & 1;
      thread.answer = meeting.op == WarpOp::kBallot ? ballot
                      : source_came                 ? lanes[thread.source_lane].offer
                                                    : ~std::uint64_t{0};  // undefined on a GPU
      make_ready(warp * kLanes + thread.lane);
    }
    warps_[warp].open &= ~(1u << (&meeting - warps_[warp].meetings));
  }

  // The ready threads: a ring, in the order in which they became ready.
  EMU_UNINSTRUMENTED void make_ready(unsigned thread) {
    threads_[thread].state = State::kReady;
    ready_[(ready_head_ + ready_count_++) % kMaxThreads] = static_cast<std::uint16_t>(thread);
  }
  EMU_UNINSTRUMENTED unsigned take_ready() {
    const unsigned first = ready_head_;
    unsigned chosen = first;
    if (shuffled_) chosen = (first + static_cast<unsigned>(random_.below(ready_count_))) % kMaxThreads;
    const unsigned thread = ready_[chosen];
    ready_[chosen] = ready_[first];
    ready_head_ = (first + 1) % kMaxThreads;
    --ready_count_;
    return thread;
  }

  // file_name() of one place may be two strings if two translation units saw it.
  EMU_UNINSTRUMENTED static bool same(const Place& a, const Place& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
  }

  // Ends the launch from within a CUDA thread; the host composes the message, for this stack is not unwound.
  [[noreturn]] EMU_UNINSTRUMENTED void fail(Failure failure, Place here, Place others) {
    failure_ = failure;
    current_->place = here;
    others_place_ = others;
    current_->fiber->suspend();
    __builtin_unreachable();
  }

  [[noreturn]] void give_up(const std::string& message) {
    for (unsigned i = 0; i < threads_in_block_; ++i) {
      if (threads_[i].state != State::kReturned) threads_[i].fiber->abandon(&launch_end_);
    }
    acquire(&launch_end_);
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
      while (end < threads_in_block_ && threads_[end].state == threads_[i].state &&
             (threads_[i].state == State::kReturned || same(threads_[end].place, threads_[i].place))) {
        ++end;
      }
      message += (i == 0 ? " threads " : "; threads ") + std::to_string(i) + "-" + std::to_string(end - 1);
      message += threads_[i].state == State::kReturned ? " have returned" : " wait at " + describe(threads_[i].place);
      i = end;
    }
    return message;
  }

  static std::string describe(const Place& place) {
    return std::string(place.file_name()) + ":" + std::to_string(place.line());
  }

  std::mutex mutex_;  // launches from several host threads take turns
  std::vector<std::unique_ptr<Fiber>> fibers_;
  unsigned fiber_sets_ = 1;
  std::optional<SharedMemory> shared_memory_;
  Kernel kernel_{};
  bool shuffled_ = false;
  RandomNumbers random_;
  Order launch_begin_{}, launch_end_{}, fence_{};

  // Of the block that runs.
  Thread* current_ = nullptr;
  unsigned threads_in_block_ = 0;
  unsigned live_ = 0;  // threads that have not returned
  Thread threads_[kMaxThreads]{};
  Warp warps_[kMaxWarps]{};
  Barrier barrier_{};
  Order block_fence_{};
  bool atomics_seen_ = false, fenced_ = false;
  std::uint16_t ready_[kMaxThreads]{};
  unsigned ready_head_ = 0, ready_count_ = 0;
  Failure failure_ = Failure::kNone;
  Place others_place_{};
};

inline Executor executor;

}  // namespace emu
