// Errors that a user may cause: a message of several parts, thrown.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace xbn {

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "a, b or c"
inline std::string one_of(const std::vector<std::string>& words) {
  std::string all;
  for (size_t i = 0; i < words.size(); ++i) all += (i == 0 ? "" : i + 1 < words.size() ? ", " : " or ") + words[i];
  return all;
}

}  // namespace xbn
