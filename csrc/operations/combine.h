// Arguments of the operation `combine`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct Combine {
  Tensor attention_losses;      // (L, N)
  Tensor logits_losses;         // (4, R)
  double alpha;                 // weight of the divergence
  double beta;                  // weight of the attention term
  bool has_targets;             // whether the cross-entropies count
  Tensor parts;                 // (5,): total, ce_student, ce_teacher, kd, feature
  std::vector<Tensor> scalars;  // the total; or ce_student, ce_teacher and kd
  FRSKD_INPUTS(attention_losses, logits_losses, alpha, beta, has_targets)
  FRSKD_OUTPUTS(parts, scalars)
};

}  // namespace frskd
