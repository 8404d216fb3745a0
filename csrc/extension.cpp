// The extension module and the ops that compute nothing. xbn_ext/schemas.py has the signature of every op, and
// xbn_ext/_library.py defines them.
#include <Python.h>

#include "cpu/cpu.h"
#include "glue/tensor.h"
#include "loss_way.h"

namespace {
std::string cpu_isa() { return xbn::isa_name(xbn::cpu_isa()); }
}  // namespace

XBN_TORCH_LIBRARY_IMPL(XBN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_loss_way", TORCH_BOX(&xbn::set_loss_way));
}

// Importing this module loads the library, which is what registers the kernels.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
