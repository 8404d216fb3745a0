#include "path.h"

#include <atomic>
#include <stdexcept>

namespace xbn {
namespace {

constexpr const char* kNames[] = {"auto", "simt", "tensor", "composite"};
std::atomic<LossPath> path{LossPath::automatic};

}  // namespace

LossPath loss_path() { return path; }

std::string set_loss_path(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return kNames[static_cast<int>(path.exchange(static_cast<LossPath>(i)))];
  throw std::runtime_error("backend must be 'auto', 'simt', 'tensor' or 'composite', got '" + name + "'");
}

}  // namespace xbn
