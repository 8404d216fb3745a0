// What ops accept: each op checks its arguments with this first, so nothing is written on bad input, and the message
// names the op and the argument. Only shapes, dtypes, devices and layouts are looked at: reading a value would make a
// GPU wait.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>

#include "../check.h"
#include "../math/half.h"
#include "tensor.h"

namespace xbn {

// The name of a dtype in Python; torch's own name for the rare ones.
inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << ']';
  return s.str();
}

// Checks the tensors of one call of one op, all on the device of the first.
class Contract {
 public:
  Contract(const char* op, const Tensor& first) : op_(op), first_(first) {}

  const char* op() const { return op_; }

  template <typename... Words>
  void require(bool ok, const Words&... words) const {
    check(ok, op_, ": ", words...);
  }

  // `shape` as words for the message, `sizes` as numbers; -1 takes any size.
  void shape(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    given(name, t);
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] < 0 || t.size(d) == sizes[d];
    check(same, op_, ": ", name, " must be ", words, describe(sizes), ", got ", shape_of(t));
    check(t.device() == first_.device(), op_, ": ", name, " is on another device than the other arguments");
  }
  // Where a tensor is required, torch passes None on as one that is undefined, which has no dtype.
  void given(const char* name, const Tensor& t) const {
    check(t.defined(), op_, ": ", name, " must be a tensor, got None");
  }
  void floating(const char* name, const Tensor& t) const {
    given(name, t);
    const ScalarType dtype = t.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op_, ": ", name,
          " must be float32 or float64, got ", name_of(dtype));
  }
  void dtype(const char* name, const Tensor& t, ScalarType expected, const char* word) const {
    check(t.scalar_type() == expected, op_, ": ", name, " must be ", word, ", got ", name_of(t.scalar_type()));
  }
  void contiguous(const char* name, const Tensor& t) const {
    check(t.is_contiguous(), op_, ": ", name, " must be contiguous");
  }
  // A matrix of embeddings.
  void matrix(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    floating(name, t);
    columns(name, t, words, std::move(sizes));
  }
  // A bank of dimension D, or of any.
  void bank(const char* name, const Tensor& t, int64_t D = -1) const {
    given(name, t);
    const ScalarType dtype = t.scalar_type();
#define XBN_IS(S, its_name, ...) || dtype == ScalarType::its_name
    const bool is_one = false XBN_FOR_EACH_BANK(XBN_IS);
#undef XBN_IS
#define XBN_NAME(S, its_name, word) #word,
    if (!is_one)
      check(false, op_, ": ", name, " must be ", one_of({XBN_FOR_EACH_BANK(XBN_NAME)}), ", got ", name_of(dtype));
#undef XBN_NAME
    columns(name, t, "[M, D]", {-1, D});
    contiguous(name, t);
  }
  void columns(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    shape(name, t, words, std::move(sizes));
    check(t.size(1) > 0, op_, ": ", name, " must have at least one column");
  }
  void labels(const char* name, const Tensor& t, const char* words, int64_t n) const {
    shape(name, t, words, {n});
    dtype(name, t, ScalarType::Long, "int64");
  }
  void rows_mask(const char* name, const OptionalTensor& t, int64_t n, const char* words = "[B]") const {
    if (!t) return;
    shape(name, *t, words, {n});
    dtype(name, *t, ScalarType::Bool, "bool");
  }
  // State of the memory: float64 or int64, written in place.
  void statistic(const char* name, const Tensor& t, const char* words, std::vector<int64_t> sizes) const {
    shape(name, t, words, std::move(sizes));
    dtype(name, t, ScalarType::Double, "float64");
    contiguous(name, t);
  }
  void counter(const char* name, const Tensor& t) const {
    shape(name, t, "a scalar", {});
    dtype(name, t, ScalarType::Long, "int64");
  }
  // A norm is divided by at least this: float32 holds it and its reciprocal.
  void eps(double eps) const {
    check(eps >= 1e-30 && eps <= 1e30, op_, ": eps must be positive, within [1e-30, 1e30], got ", eps);
  }

 private:
  static std::string describe(const std::vector<int64_t>& sizes) {
    std::ostringstream s;
    s << " (";
    for (size_t d = 0; d < sizes.size(); ++d) {
      s << (d ? ", " : "");
      sizes[d] < 0 ? s << "any" : s << sizes[d];
    }
    s << ')';
    return sizes.empty() ? "" : s.str();
  }

  const char* op_;
  const Tensor& first_;
};

// An argument that may be missing, by its name.
struct Argument {
  Argument(const char* its_name, const Tensor& t) : name(its_name), begin(address(t)), end(begin + bytes(t)) {}
  Argument(const char* its_name, const OptionalTensor& t) : name(its_name) {
    if (t) *this = Argument(its_name, *t);
  }
  bool shares_memory_with(const Argument& other) const { return begin < other.end && other.begin < end; }

  const char* name;
  uintptr_t begin = UINTPTR_MAX, end = 0;  // of its memory; as they stand here, none

 private:
  static uintptr_t bytes(const Tensor& t) { return static_cast<uintptr_t>(t.numel() * t.element_size()); }
  static uintptr_t address(const Tensor& t) {
    return t.numel() > 0 ? reinterpret_cast<uintptr_t>(t.const_data_ptr()) : UINTPTR_MAX;
  }
};

// What an op writes shares no memory with what it reads, nor with anything else it writes: rows would be overwritten
// before they are read. All tensors are dense.
inline void check_apart(const char* op, const std::vector<Argument>& written, const std::vector<Argument>& read) {
  for (auto w = written.begin(); w != written.end(); ++w) {
    for (const Argument& r : read)
      check(!r.shares_memory_with(*w), op, ": ", r.name, " must not share memory with ", w->name);
    for (auto other = written.begin(); other != w; ++other)
      check(!w->shares_memory_with(*other), op, ": ", w->name, " must not share memory with ", other->name);
  }
}

}  // namespace xbn
