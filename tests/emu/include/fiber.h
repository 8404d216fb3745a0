// A fiber: a call stack of its own, run by whoever calls resume() until it calls suspend(). x86-64 only.
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
// not look into the body for the registers that survive the call, for none but the callee-saved ones do.
__attribute__((naked, noipa, no_sanitize("thread", "address"))) inline void switch_stack(void** /*save*/,
                                                                                         void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

class Fiber {
 public:
  // `number` staggers the stacks, whose hottest lines would otherwise compete for the same few cache sets.
  explicit Fiber(unsigned number) : top_offset_(number % kColours * kColourBytes) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, kGuardBytes, PROT_NONE);
#ifdef __SANITIZE_THREAD__
    tsan_self_ = __tsan_create_fiber(0);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(tsan_self_);
#endif
    munmap(mapping_, kGuardBytes + kStackBytes);
  }

  // The next resume() calls entry(argument), which must never return: its last act is finish().
  EMU_UNINSTRUMENTED void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    void** top = reinterpret_cast<void**>(stack() + kStackBytes - top_offset_);
    top[-1] = nullptr;  // entry's return address
    top[-2] = reinterpret_cast<void*>(&Fiber::begin);
    stack_pointer_ = top - 8;  // six registers below that
  }

  EMU_UNINSTRUMENTED void resume() {
    resumed() = this;
#ifdef __SANITIZE_THREAD__
    tsan_host_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_self_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack(), kStackBytes);
#endif
    switch_stack(&host_stack_pointer_, stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  EMU_UNINSTRUMENTED void suspend() {
#ifdef __SANITIZE_ADDRESS__
    leave(&asan_fake_stack_);
    __sanitizer_finish_switch_fiber(asan_fake_stack_, &asan_host_stack_, &asan_host_stack_bytes_);
#else
    leave(nullptr);
#endif
  }

  // Leaves for good; the fiber may then be started again.
  [[noreturn]] EMU_UNINSTRUMENTED void finish() {
    leave(nullptr);
    __builtin_unreachable();
  }

  // Gives up a suspended fiber where it stands, without unwinding its stack. What it has done is released to `order`.
  EMU_UNINSTRUMENTED void abandon([[maybe_unused]] Order* order) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack(), kStackBytes);
#endif
#ifdef __SANITIZE_THREAD__
    void* const host = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_self_, __tsan_switch_to_fiber_no_sync);
    release(order);
    __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(tsan_self_);  // its record of calls is not unwound either
    tsan_self_ = __tsan_create_fiber(0);
#endif
  }

 private:
  static constexpr std::size_t kGuardBytes = 4096, kStackBytes = 256 << 10;
  static constexpr std::size_t kColours = 64, kColourBytes = 512 + 64;

  static Fiber*& resumed() {
    static constinit Fiber* fiber = nullptr;
    return fiber;
  }

  EMU_UNINSTRUMENTED static void begin() {
    Fiber& self = *resumed();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &self.asan_host_stack_, &self.asan_host_stack_bytes_);
#endif
    self.entry_(self.argument_);
    __builtin_trap();
  }

  EMU_UNINSTRUMENTED void leave([[maybe_unused]] void** fake_stack) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(tsan_host_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake_stack, asan_host_stack_, asan_host_stack_bytes_);
#endif
    switch_stack(&stack_pointer_, host_stack_pointer_);
  }

  char* stack() { return mapping_ + kGuardBytes; }

  char* mapping_;
  std::size_t top_offset_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* host_stack_pointer_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  void* asan_fake_stack_ = nullptr;
  const void* asan_host_stack_ = nullptr;
  std::size_t asan_host_stack_bytes_ = 0;
#endif
#ifdef __SANITIZE_THREAD__
  void* tsan_self_;
  void* tsan_host_ = nullptr;
#endif
};

}  // namespace emu
