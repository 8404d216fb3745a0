// A loss as the kernels take it, from its name and its parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "../check.h"
#include "../math/losses.h"

namespace xbn {

inline LossSpec parse_loss(const char* op, const std::string& name, const std::vector<double>& parameters) {
  const auto known =
      std::find_if(std::begin(kLosses), std::end(kLosses), [&](const auto& k) { return name == k.name; });
  check(known != std::end(kLosses), op, ": unknown loss '", name, "'");
  check(static_cast<int>(parameters.size()) == known->parameters, op, ": ", name, " takes ", known->parameters,
        " parameters, got ", parameters.size());
  for (const double x : parameters) check(std::isfinite(x), op, ": the parameters of ", name, " must be finite");
  for (size_t k = 0; k < 2 && k < parameters.size(); ++k)
    check(known->divides[k] == nullptr || (parameters[k] >= 1e-30 && parameters[k] <= 1e30), op, ": the ",
          known->divides[k], " of ", name, " must be within [1e-30, 1e30], got ", parameters[k]);
  const auto parameter = [&](size_t k, double otherwise) { return k < parameters.size() ? parameters[k] : otherwise; };
  LossSpec loss;
  loss.kind = known->kind;
  loss.average = known->average;
  loss.a = parameter(0, 0);
  loss.b = parameter(1, 0);
  loss.c = parameter(2, 0);
  loss.mining = parameter(3, -1);
  return of_distance(loss, known->distance);
}

}  // namespace xbn
