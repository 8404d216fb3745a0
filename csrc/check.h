// Errors that a user may cause: a message of several parts, thrown.
#pragma once

#include <sstream>
#include <stdexcept>

namespace xbn {

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace xbn
