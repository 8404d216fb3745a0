#include "path.h"

#include <atomic>
#include <stdexcept>

namespace xbn {
namespace {

constexpr const char* kNames[] = {"auto", "simt", "tensor", "composite", "screen", "pairs"};
std::atomic<LossPath> path{LossPath::automatic};

}  // namespace

LossPath loss_path() { return path; }

const char* name_of(LossPath path) { return kNames[static_cast<int>(path)]; }

std::string set_loss_path(const std::string& name) {
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return name_of(path.exchange(static_cast<LossPath>(i)));
  throw std::runtime_error("backend must be 'auto', 'simt', 'tensor', 'screen' or 'composite', got '" + name + "'");
}

}  // namespace xbn
