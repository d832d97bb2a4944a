// A checked fusion node as the kernels take it, for the entry points of `fusion` and `fused_convolution`.
#pragma once

#include "../operations/fusion.h"
#include "fusion_call.h"
#include "tensors.h"

namespace frskd {

inline Fusion fusion_of(const FusionNode& node, const FusionSettings& settings, const Tensor& out) {
  Fusion call{};
  call.count = static_cast<int>(node.inputs.size());
  call.batch = out.size(0);
  call.out = map_of(out);
  call.pre = static_cast<int>(settings.pre);
  call.weighting = static_cast<int>(settings.weighting);
  call.epsilon = settings.epsilon;
  call.weight = node.weight.data_ptr();
  for (int i = 0; i < call.count; ++i) {
    FusionInput& input = call.inputs[i];
    input.map = map_of(node.inputs[i]);
    input.resample = static_cast<int>(settings.resamples[i]);
    input.statistics = data_or_null(node.statistics[i]);
    input.gamma = data_or_null(node.gammas[i]);
    input.beta = data_or_null(node.betas[i]);
  }
  return call;
}

// Where the first backward pass writes its sums.
inline void add_sums(Fusion& call, const std::vector<Tensor>& sums, const Tensor& weight_gradient) {
  for (int i = 0; i < call.count; ++i) call.inputs[i].sums_out = data_or_null(sums[i]);
  call.weight_gradient = weight_gradient.data_ptr();
}

}  // namespace frskd
