// Fibers: call stacks of their own, between which the one that runs switches. x86-64 only.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <new>

#include "happens_before.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "The stack switch is written for x86-64"
#endif

namespace [[gnu::visibility("hidden")]] emu {

// Saves the callee-saved registers and the stack pointer, then goes on where `load` was saved. noipa: callers must
// not look into the body for the registers that survive the call: only the callee-saved ones do.
__attribute__((naked, noipa, no_sanitize("thread", "address"))) inline void switch_stack(void** /*save*/,
                                                                                         void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

// The stacks, in one range of addresses: AddressSanitizer, which must know on which stack the program is, is told of
// the range when the host enters it and leaves it, not of every switch within.
class Stacks {
 public:
  static constexpr unsigned kMost = 2048;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (unsigned i = 0; i < count_; ++i) forget(i);
    if (memory_) munmap(memory_, kMost * kPitch);
  }

  // At least so many. The rest of the range, and a page below each stack, are inaccessible.
  void provide(unsigned count) {
    if (!memory_) {
      void* memory = mmap(nullptr, kMost * kPitch, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
    }
    for (; count_ < count; ++count_) {
      if (mprotect(bottom(count_), kBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    }
  }

  // What to switch_stack() to for entry(), which must never return, to begin on that stack.
  EMU_UNINSTRUMENTED void* start(unsigned number, void (*entry)()) const {
    forget(number);
    // Staggered, for their hottest lines would otherwise compete for the same few cache sets.
    void** top = reinterpret_cast<void**>(bottom(number) + kBytes - number % kColours * kColourBytes);
    top[-1] = nullptr;  // entry's return address
    top[-2] = reinterpret_cast<void*>(entry);
    return top - 8;  // six registers below that
  }

  // By the host. The first entry to begin calls entered(); the host is back when a fiber leaves for it.
  EMU_UNINSTRUMENTED void enter(void* stack_pointer) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    entering_ = true;
    __sanitizer_start_switch_fiber(&fake_stack, memory_, kMost * kPitch);
#endif
    switch_stack(&host_stack_pointer_, stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
  EMU_UNINSTRUMENTED void entered() {
#ifdef __SANITIZE_ADDRESS__
    if (entering_) __sanitizer_finish_switch_fiber(nullptr, &host_stack_, &host_stack_bytes_);
    entering_ = false;
#endif
  }
  [[noreturn]] EMU_UNINSTRUMENTED void leave() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, host_stack_, host_stack_bytes_);
#endif
    void* nowhere;
    switch_stack(&nowhere, host_stack_pointer_);
    __builtin_unreachable();
  }

 private:
  static constexpr std::size_t kGuardBytes = 4096, kBytes = 256 << 10, kPitch = kGuardBytes + kBytes;
  static constexpr std::size_t kColours = 64, kColourBytes = 512 + 64;
  static constexpr std::size_t kFrameBytes = kColours * kColourBytes + (16 << 10);  // more than a kernel's frames take

  // What AddressSanitizer knows of a stack's last frames: of a launch that failed, they are not unwound; and g++ 12
  // with -Og leaves some variables of the screen's kernel out of scope when it returns.
  EMU_UNINSTRUMENTED void forget([[maybe_unused]] unsigned number) const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom(number) + kBytes - kFrameBytes, kFrameBytes);
#endif
  }

  EMU_UNINSTRUMENTED char* bottom(unsigned number) const { return memory_ + number * kPitch + kGuardBytes; }

  char* memory_ = nullptr;
  unsigned count_ = 0;
  void* host_stack_pointer_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  bool entering_ = false;
  const void* host_stack_ = nullptr;
  std::size_t host_stack_bytes_ = 0;
#endif
};

}  // namespace emu
