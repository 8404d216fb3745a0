// A GPU as the kernels' launches and the glue see it. Neither needs a CUDA header for that: a stream is a void*, an
// error an int, 0 for none.
#pragma once

#include <cstdint>

namespace xbn::cuda {

// What an op's kernels are launched with. The glue gives what is virtual.
class Gpu {
 public:
  virtual ~Gpu() = default;

  // Temporary memory: so many bytes of any content, aligned to 256, for as long as the op runs.
  virtual void* workspace(int64_t /*bytes*/) const { return nullptr; }

  // out [n, m] = a [n, k] times b [m, k] transposed, and sum [n, k] += a [n, m] times b [m, k], of float or double: by
  // the library that torch uses, in the precision that torch is set to.
  template <typename T>
  void multiply_transposed(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* out) const {
    multiply_transposed({a, b, out, n, m, k, sizeof(T) == 8});
  }
  template <typename T>
  void add_product(const T* a, const T* b, int64_t n, int64_t m, int64_t k, T* sum) const {
    add_product({a, b, sum, n, m, k, sizeof(T) == 8});
  }

  const char* op = "";      // for errors
  void* stream = nullptr;   // cudaStream_t
  int multiprocessors = 0;  // of the device
  int capability = 0;       // major * 10 + minor
  int shared_memory = 0;    // bytes that a block may ask for

 protected:
  struct Product {
    const void *a, *b;
    void* out;
    int64_t n, m, k;
    bool float64;
  };
  virtual void multiply_transposed(const Product&) const {}
  virtual void add_product(const Product&) const {}
};

// Makes `device` current and describes it.
int use_device(int device, Gpu* gpu);

const char* error_string(int error);
bool is_missing_kernel(int error);       // the build has nothing for this GPU
bool is_insufficient_driver(int error);  // the driver is older than the CUDA this was built with

// What this build has machine code for, as in "75;80;90a;80-ptx".
const char* architectures();

}  // namespace xbn::cuda
