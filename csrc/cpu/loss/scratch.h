// Memory to work in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace xbn {

// Uninitialised cache-aligned memory: parts that are never touched are never paged in.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(::operator new(bytes(n), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static size_t bytes(int64_t n) { return static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T); }
  T* data_;
};

}  // namespace xbn
