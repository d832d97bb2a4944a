// Arguments of the operation `fusion`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

// The tensors of one node; those of an input that is not normalised are empty (numel 0).
struct FusionNode {
  std::vector<Tensor> inputs;      // K x (N, C, H_i, W_i)
  std::vector<Tensor> statistics;  // K x (>= 2, C): mean, inverse deviation
  std::vector<Tensor> gammas;      // K x (C,)
  std::vector<Tensor> betas;       // K x (C,)
  Tensor weight;                   // (K,)
  FRSKD_INPUTS(inputs, statistics, gammas, betas, weight)
};

// The numbers of one node; common/fusion_math.h names their values.
struct FusionSettings {
  std::vector<std::int64_t> resamples;  // (K,)
  std::int64_t pre;
  std::int64_t weighting;
  double epsilon;
  FRSKD_INPUTS(resamples, pre, weighting, epsilon)
};

struct FusionStatistics {
  std::vector<Tensor> inputs;       // K x (N, C, H_i, W_i)
  std::vector<double> epsilons;     // (K,), added to the variances
  std::vector<Tensor> statistics;   // K x (3, C): mean, inverse deviation, biased variance
  std::optional<Tensor> workspace;  // of a device, as frskd_fast/native/fusion.py sizes it
  FRSKD_INPUTS(inputs, epsilons)
  FRSKD_OUTPUTS(statistics, workspace)
};

struct FusionForward {
  FusionNode node;
  FusionSettings settings;
  Tensor out;  // (N, C, H, W)
  FRSKD_INPUTS(node, settings)
  FRSKD_OUTPUTS(out)
};

struct FusionBackwardSums {
  Tensor grad;  // (N, C, H, W), any strides
  FusionNode node;
  FusionSettings settings;
  std::vector<Tensor> sums;  // K x (2, C): of dy and of dy * xhat; or empty as the statistics
  Tensor weight_gradient;    // (K,)
  std::optional<Tensor> workspace;
  FRSKD_INPUTS(grad, node, settings)
  FRSKD_OUTPUTS(sums, weight_gradient, workspace)
};

struct FusionBackward {
  Tensor grad;  // (N, C, H, W), any strides
  FusionNode node;
  std::vector<Tensor> sums;  // K x (2, C); or empty: not normalised, or by running statistics
  FusionSettings settings;
  std::vector<std::int64_t> positions;    // of the inputs that need a gradient, rising
  std::vector<Tensor> gradients;          // as those inputs
  std::optional<Tensor> weight_gradient;  // (K,)
  std::optional<Tensor> workspace;
  FRSKD_INPUTS(grad, node, sums, settings, positions)
  FRSKD_OUTPUTS(gradients, weight_gradient, workspace)
};

}  // namespace frskd
