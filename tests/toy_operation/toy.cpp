// The toy operation on the CPU: a file that registers itself, and that no other file mentions.
#include "toy.h"

#include "cpu/checks.h"

namespace frskd {
namespace {

void toy(const Toy& call) {
  const std::int64_t count = call.pair.student.numel();
  const auto* student =
      static_cast<const double*>(working_tensor(call.pair.student, Element::kFloat64, count, "student"));
  const auto* teacher =
      static_cast<const double*>(working_tensor(call.pair.teacher, Element::kFloat64, count, "teacher"));
  auto* out = static_cast<double*>(working_tensor(call.out, Element::kFloat64, count, "out"));
  for (std::int64_t i = 0; i < count; ++i) out[i] = call.scale * (student[i] - teacher[i]);
}

FRSKD_CPU_OPERATION(toy)

}  // namespace
}  // namespace frskd
