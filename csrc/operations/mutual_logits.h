// Arguments of the operation `mutual_logits`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct MutualLogitsSettings {
  double temperature;
  double offset;  // added to every probability that is a target
  std::int64_t ignore_index;
  FRSKD_INPUTS(temperature, offset, ignore_index)
};

struct MutualLogitsForward {
  std::vector<Tensor> logits;     // S networks x (N, K), then those of the fused classifier
  std::optional<Tensor> targets;  // (N,) class indices, for the cross-entropies
  Tensor weight;                  // (), of the divergences
  MutualLogitsSettings settings;
  Tensor loss;       // ()
  Tensor terms;      // (2, S + 1): cross-entropies, divergences
  Tensor rows;       // (2, S + 1, N): the same of each row
  Tensor gradients;  // (S + 1, N, K): of the loss
  FRSKD_INPUTS(logits, targets, weight, settings)
  FRSKD_OUTPUTS(loss, terms, rows, gradients)
};

}  // namespace frskd
