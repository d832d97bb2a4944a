// The FRSKD objective from its unreduced parts on the CPU: one pass over a few thousand numbers, in order, in double.
#include "../operations/combine_checks.h"

namespace frskd {
namespace {

template <typename A>
void combine_typed(const Combine& call) {
  const A* attention = static_cast<const A*>(call.attention_losses.data_ptr());
  const A* logits = static_cast<const A*>(call.logits_losses.data_ptr());
  const std::int64_t levels = call.attention_losses.size(0), batch = call.attention_losses.size(1);
  const std::int64_t rows = call.logits_losses.size(1);
  double sums[4] = {0, 0, 0, 0};
  // Every sum waits for its previous addition, so four at a time take as long as one.
  for (std::int64_t row = 0; row < rows; ++row) {
    for (int part = 0; part < 4; ++part) sums[part] += logits[part * rows + row];
  }
  double feature = 0;
  for (std::int64_t index = 0; index < levels * batch; ++index) feature += attention[index];
  if (batch > 0) feature /= static_cast<double>(batch);
  const double inverse_valid = !call.has_targets || sums[3] == 0 ? 0 : 1 / sums[3];
  const double ce_student = call.has_targets ? sums[0] * inverse_valid : 0,
               ce_teacher = call.has_targets ? sums[1] * inverse_valid : 0;
  const double kd = rows > 0 ? sums[2] / static_cast<double>(rows) : 0;
  const double attention_term = levels > 0 ? call.beta * feature : 0;
  const double total = ce_student + ce_teacher + call.alpha * kd + attention_term;
  const double parts[5] = {total, ce_student, ce_teacher, kd, feature};
  for (int part = 0; part < 5; ++part) static_cast<A*>(call.parts.data_ptr())[part] = static_cast<A>(parts[part]);
  const std::size_t count = call.scalars.size(), first = count == 1 ? 0 : 1;
  for (std::size_t i = 0; i < count; ++i) {
    *static_cast<A*>(call.scalars[i].data_ptr()) = static_cast<A>(parts[first + i]);
  }
}

void combine(const Combine& call) {
  const bool wide = check(call, Device::kCpu).accumulate == ScalarType::Double;
  wide ? combine_typed<double>(call) : combine_typed<float>(call);
}

FRSKD_CPU_OPERATION(combine)

}  // namespace
}  // namespace frskd
