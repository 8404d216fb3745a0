// The ways that memory_loss can go: chosen by the shapes, or forced for tests and measurements. On a CPU there are two: by a
// screen that finds the pairs that may count, or without.
#pragma once

#include <string>

namespace xbn {

// Named in loss_way.cpp, in this order. pairs, for tests and measurements: as screen, however much that leaves.
enum class LossWay { automatic, simt, tensor, screen, halves, composite, pairs };

LossWay loss_way();

const char* name_of(LossWay way);

// Takes one of their names, "auto" for automatic, and returns what was set before. Throws std::runtime_error on another
// name.
std::string set_loss_way(const std::string& name);

}  // namespace xbn
