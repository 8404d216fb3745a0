// Which way memory_loss goes on a GPU: chosen by the shapes, or forced for tests and measurements.
#pragma once

#include <string>

namespace xbn {

enum class LossPath { automatic, simt, tensor, composite };

LossPath loss_path();

// Takes "auto", "simt", "tensor" or "composite" and returns what was set before. Throws std::runtime_error on another name.
std::string set_loss_path(const std::string& name);

}  // namespace xbn
