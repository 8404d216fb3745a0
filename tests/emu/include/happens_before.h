// What ThreadSanitizer is told about the order of memory accesses of CUDA threads. Without it all of this is empty.
#pragma once
#include <cstddef>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>

// Entry points of the ThreadSanitizer runtime that its headers do not declare.
extern "C" {
void __tsan_java_alloc(unsigned long address, unsigned long bytes);
void __tsan_java_free(unsigned long address, unsigned long bytes);
}
#endif

// Marks the executor's own functions. CUDA threads hand its bookkeeping to one another without any order that
// ThreadSanitizer knows of, so that instrumented code would report it as racy. Functions of the standard library are
// instrumented even when called from such a function, so the executor uses plain arrays.
#ifdef __SANITIZE_THREAD__
#define EMU_UNINSTRUMENTED __attribute__((noinline, no_sanitize("thread")))
#else
#define EMU_UNINSTRUMENTED __attribute__((no_sanitize("address", "undefined")))
#endif
#define EMU_HOT inline __attribute__((always_inline))  // of functions that are called from such ones only

namespace [[gnu::visibility("hidden")]] emu {

#ifdef __SANITIZE_THREAD__

inline constexpr bool kRaceDetection = true;

// What the calling thread has done is visible to those that acquire(object) later.
inline void release(void* object) { __tsan_release(object); }
inline void acquire(void* object) { __tsan_acquire(object); }

// What ThreadSanitizer takes for a thread. Going over to another one orders nothing.
using Identity = void*;
inline Identity new_identity() { return __tsan_create_fiber(0); }
inline void end_identity(Identity identity) { __tsan_destroy_fiber(identity); }
inline Identity present_identity() { return __tsan_get_current_fiber(); }
inline void become(Identity identity) { __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync); }

// Makes memory as good as newly allocated: no access to it and no release() on it has happened yet.
inline void forget(void* memory, std::size_t bytes) {
  const auto address = reinterpret_cast<unsigned long>(memory);
  const unsigned long begin = address & ~7ul, end = (address + bytes + 7) & ~7ul;
  if (begin == end) return;
  __tsan_java_alloc(begin, end - begin);  // clears the record of accesses, but claims the range as a heap block
  __tsan_java_free(begin, end - begin);   // clears the record of releases and the claim
}

#else

inline constexpr bool kRaceDetection = false;
inline void release(void*) {}
inline void acquire(void*) {}
using Identity = void*;
inline Identity new_identity() { return nullptr; }
inline void end_identity(Identity) {}
inline Identity present_identity() { return nullptr; }
inline void become(Identity) {}
inline void forget(void*, std::size_t) {}

#endif

// A thing to release() and acquire(). ThreadSanitizer keeps its state by address, in units of eight bytes.
struct alignas(8) Order {
  char storage[8];
};

}  // namespace emu
