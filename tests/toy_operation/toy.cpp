// The toy operation on the CPU: a file that registers itself, and that no other file mentions.
#include "toy.h"

namespace frskd {
namespace {

void toy(const Toy& call) {
  check(call, Device::kCpu);
  const auto* student = static_cast<const double*>(call.pair.student.data_ptr());
  const auto* teacher = static_cast<const double*>(call.pair.teacher.data_ptr());
  auto* out = static_cast<double*>(call.out.data_ptr());
  const std::int64_t count = call.out.numel();
  for (std::int64_t i = 0; i < count; ++i) out[i] = call.scale * (student[i] - teacher[i]);
}

FRSKD_CPU_OPERATION(toy)

}  // namespace
}  // namespace frskd
