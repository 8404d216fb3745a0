#include "loss_way.h"

#include <atomic>
#include <iterator>

#include "check.h"

namespace xbn {
namespace {

constexpr const char* kNames[] = {"auto", "simt", "tensor", "screen", "halves", "composite", "pairs"};
std::atomic<LossWay> way{LossWay::automatic};

}  // namespace

LossWay loss_way() { return way; }

const char* name_of(LossWay way) { return kNames[static_cast<int>(way)]; }

std::string set_loss_way(const std::string& name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i)
    if (name == kNames[i]) return name_of(way.exchange(static_cast<LossWay>(i)));
  std::vector<std::string> for_users;
  for (const char* known : kNames)
    if (known != name_of(LossWay::pairs)) for_users.push_back("'" + std::string(known) + "'");
  check(false, "way must be ", one_of(for_users), ", got '", name, "'");
  return {};
}

}  // namespace xbn
