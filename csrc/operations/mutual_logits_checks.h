// Checks of the operation `mutual_logits`.
#pragma once

#include "checks.h"
#include "mutual_logits.h"

namespace frskd {

inline Kind check(const MutualLogitsForward& call, Device device) {
  const std::vector<Tensor>& logits = call.logits;
  STD_TORCH_CHECK(
      logits.size() >= 3, "logits has ", logits.size(),
      " entries, but those of two networks or more and of the fused classifier were wanted.");
  const Kind kind = kind_of(logits[0], {"logits", 0}, device);
  STD_TORCH_CHECK(
      logits[0].dim() == 2 && logits[0].size(1) > 0 && logits[0].size(1) <= kLimit, "logits[0] has shape ",
      shape_text(logits[0]), ", but (N, K) with from 1 to 2^30 classes was wanted.");
  for (std::size_t head = 1; head < logits.size(); ++head) {
    STD_TORCH_CHECK(
        logits[head].dim() == 2, "logits[", head, "] has shape ", shape_text(logits[head]), ", but (N, K) was wanted.");
    check_like(logits[head], {"logits", head}, kind, kind.dtype, logits[0]);
  }
  const std::int64_t heads = static_cast<std::int64_t>(logits.size()), rows = logits[0].size(0);
  if (call.targets.has_value()) {
    const Tensor& targets = *call.targets;
    check_device(targets, "targets", kind);
    check_dtype(targets, "targets", ScalarType::Long);
    STD_TORCH_CHECK(
        targets.dim() == 1 && targets.size(0) == rows, "targets has shape ", shape_text(targets), ", but (", rows,
        ") was wanted.");
  }
  STD_TORCH_CHECK(
      std::isfinite(call.settings.temperature) && call.settings.temperature > 0.0, "temperature is ",
      call.settings.temperature, ", but a finite number above 0 was wanted.");
  check_at_least(call.settings.offset, "offset", 0.0);
  check_numbers(call.weight, "weight", kind, {});
  check_numbers(call.loss, "loss", kind, {});
  check_numbers(call.terms, "terms", kind, {2, heads});
  check_numbers(call.rows, "rows", kind, {2, heads, rows});
  check_numbers(call.gradients, "gradients", kind, {heads, rows, logits[0].size(1)});
  return kind;
}

}  // namespace frskd
