// Arguments of the kernels of a fusion node with a depthwise convolution behind it, and their table.
#pragma once

#include "fusion_call.h"

namespace frskd {

// A depthwise 3x3 convolution of a fused map; the node's `out` is then its result.
struct FusedConvolution {
  const void* weight;     // (C, 9)
  void* weight_gradient;  // (C, 9), backward
  Map map_gradient;       // of the fused map, backward
};

struct FusedConvolutionKernels {
  void (*forward)(const Fusion&, const FusedConvolution&, Element, ParallelFor, int threads);
  void (*backward)(const Fusion&, const FusedConvolution&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_KERNELS(FusedConvolutionKernels)

}  // namespace frskd
