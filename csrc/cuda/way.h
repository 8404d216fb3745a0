// Which way memory_loss goes on a GPU: chosen by the shapes, or forced for tests and measurements.
#pragma once

#include <string>

namespace xbn {

// pairs, for tests and measurements: as screen, however much that leaves.
enum class LossWay { automatic, simt, tensor, composite, screen, pairs };

LossWay loss_way();

const char* name_of(LossWay way);

// Takes one of their names, "auto" for automatic, and returns what was set before. Throws std::runtime_error on another name.
std::string set_loss_way(const std::string& name);

}  // namespace xbn
