#include "path.h"

#include <atomic>
#include <stdexcept>

namespace xbn {
namespace {

constexpr const char* kNames[] = {"auto", "simt", "composite"};
std::atomic<LossPath> path{LossPath::automatic};

}  // namespace

LossPath loss_path() { return path; }

std::string set_loss_path(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == kNames[i]) return kNames[static_cast<int>(path.exchange(static_cast<LossPath>(i)))];
  throw std::runtime_error("backend must be 'auto', 'simt' or 'composite', got '" + name + "'");
}

}  // namespace xbn
