// Checks of the operation `combine`.
#pragma once

#include "checks.h"
#include "combine.h"

namespace frskd {

inline Kind check(const Combine& call, Device device) {
  const Kind kind = kind_of(call.logits_losses, "logits_losses", device);
  STD_TORCH_CHECK(
      call.attention_losses.dim() == 2, "attention_losses has shape ", shape_text(call.attention_losses),
      ", but (levels, batch) was wanted.");
  STD_TORCH_CHECK(
      call.logits_losses.dim() == 2, "logits_losses has shape ", shape_text(call.logits_losses),
      ", but (4, rows) was wanted.");
  STD_TORCH_CHECK(
      kind.dtype == kind.accumulate, "logits_losses has dtype ", torch::headeronly::toString(kind.dtype),
      ", but Float or Double was wanted.");
  check_numbers(
      call.attention_losses, "attention_losses", kind, {call.attention_losses.size(0), call.attention_losses.size(1)});
  check_numbers(call.logits_losses, "logits_losses", kind, {4, call.logits_losses.size(1)});
  check_numbers(call.parts, "parts", kind, {5});
  const std::size_t count = call.scalars.size();
  STD_TORCH_CHECK(
      count == 1 || count == 3, "scalars has ", count,
      " entries, but one for the total, or three for ce_student, ce_teacher and kd were wanted.");
  for (std::size_t i = 0; i < count; ++i) check_numbers(call.scalars[i], {"scalars", i}, kind, {});
  return kind;
}

}  // namespace frskd
