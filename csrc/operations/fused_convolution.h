// Arguments of the operation `fused_convolution`: a fusion node with a depthwise 3x3 convolution behind it.
#pragma once

#include "fusion.h"

namespace frskd {

struct FusedConvolutionForward {
  FusionNode node;
  FusionSettings settings;
  Tensor depthwise;  // (C, 1, 3, 3), of the accumulate type
  Tensor out;        // (N, C, H, W), the convolution of the fused map
  FRSKD_INPUTS(node, settings, depthwise)
  FRSKD_OUTPUTS(out)
};

struct FusedConvolutionBackwardSums {
  Tensor grad;  // (N, C, H, W), of the convolution
  FusionNode node;
  FusionSettings settings;
  Tensor depthwise;           // (C, 1, 3, 3)
  std::vector<Tensor> sums;   // K x (2, C), or empty as the statistics
  Tensor weight_gradient;     // (K,)
  Tensor depthwise_gradient;  // (C, 1, 3, 3)
  Tensor map_gradient;        // (N, C, H, W), of the fused map
  FRSKD_INPUTS(grad, node, settings, depthwise)
  FRSKD_OUTPUTS(sums, weight_gradient, depthwise_gradient, map_gradient)
};

}  // namespace frskd
