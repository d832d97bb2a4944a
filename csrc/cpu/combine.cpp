// The FRSKD objective from its unreduced parts on the CPU: one pass over a few thousand numbers, in order, in double.
#include "../operations/combine.h"

#include "checks.h"

namespace frskd {
namespace {

template <typename A>
void combine_typed(
    const A* attention,
    std::int64_t levels,
    std::int64_t batch,
    const A* logits,
    std::int64_t rows,
    double alpha,
    double beta,
    bool has_targets,
    A* parts,
    A* const* scalars,
    std::size_t scalar_count) {
  double sums[4] = {0, 0, 0, 0};
  // Every sum waits for its previous addition, so four at a time take as long as one.
  for (std::int64_t row = 0; row < rows; ++row) {
    for (int part = 0; part < 4; ++part) sums[part] += logits[part * rows + row];
  }
  double feature = 0;
  for (std::int64_t index = 0; index < levels * batch; ++index) feature += attention[index];
  if (batch > 0) feature /= static_cast<double>(batch);
  const double inverse_valid = !has_targets || sums[3] == 0 ? 0 : 1 / sums[3];
  const double ce_student = has_targets ? sums[0] * inverse_valid : 0,
               ce_teacher = has_targets ? sums[1] * inverse_valid : 0;
  const double kd = rows > 0 ? sums[2] / static_cast<double>(rows) : 0;
  const double attention_term = levels > 0 ? beta * feature : 0;
  parts[0] = static_cast<A>(ce_student + ce_teacher + alpha * kd + attention_term);
  parts[1] = static_cast<A>(ce_student);
  parts[2] = static_cast<A>(ce_teacher);
  parts[3] = static_cast<A>(kd);
  parts[4] = static_cast<A>(feature);
  parts[5] = static_cast<A>(inverse_valid);
  if (scalar_count == 1) *scalars[0] = parts[0];
  for (int part = 0; scalar_count == 3 && part < 3; ++part) *scalars[part] = parts[part + 1];
}

void combine(const Combine& call) {
  STD_TORCH_CHECK(
      call.attention_losses.dim() == 2 && call.logits_losses.dim() == 2 && call.logits_losses.sizes()[0] == 4,
      "attention_losses must be (levels, batch) and logits_losses (4, rows), but they have shapes ",
      shape_text(call.attention_losses), " and ", shape_text(call.logits_losses), ".");
  const Element element = element_of(call.logits_losses, "logits_losses");
  STD_TORCH_CHECK(
      element == Element::kFloat32 || element == Element::kFloat64, "logits_losses must be float32 or float64.");
  const std::int64_t levels = call.attention_losses.sizes()[0], batch = call.attention_losses.sizes()[1];
  const std::int64_t rows = call.logits_losses.sizes()[1];
  const void* attention = working_tensor(call.attention_losses, element, levels * batch, "attention_losses");
  const void* logits = working_tensor(call.logits_losses, element, 4 * rows, "logits_losses");
  void* parts = working_tensor(call.parts, element, 6, "parts");
  const std::size_t count = call.scalars.size();
  STD_TORCH_CHECK(
      count == 1 || count == 3, "scalars has ", count,
      " tensors, but one for the total, or three for ce_student, ce_teacher and kd were wanted.");
  const auto run = [&](auto number) {
    using A = decltype(number);
    A* scalars[3] = {};
    for (std::size_t index = 0; index < count; ++index) {
      scalars[index] = static_cast<A*>(working_tensor(call.scalars[index], element, 1, "scalars"));
    }
    combine_typed(
        static_cast<const A*>(attention), levels, batch, static_cast<const A*>(logits), rows, call.alpha, call.beta,
        call.has_targets, static_cast<A*>(parts), scalars, count);
  };
  element == Element::kFloat64 ? run(double{}) : run(float{});
}

FRSKD_CPU_OPERATION(combine)

}  // namespace
}  // namespace frskd
