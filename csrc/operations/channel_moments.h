// Arguments of the operation `channel_moments`; docs/contracts.md has the mathematics.
#pragma once

#include "../operation.h"

namespace frskd {

struct ChannelMomentsForward {
  Tensor x;                    // (N, C, H, W)
  std::optional<Tensor> mean;  // (N, C): of the result
  std::optional<Tensor> std;
  double epsilon;
  bool unbiased;
  Tensor own_mean;            // (N, C): of x
  Tensor own_std;             // (N, C)
  std::optional<Tensor> out;  // (N, C, H, W): x with the given moments
  FRSKD_INPUTS(x, mean, std, epsilon, unbiased)
  FRSKD_OUTPUTS(own_mean, own_std, out)
};

// out = (x - centre) * scale + shift.
struct ChannelMomentsAffine {
  Tensor x;       // (N, C, H, W)
  Tensor centre;  // (N, C), as the following
  Tensor scale;
  Tensor shift;
  Tensor out;  // (N, C, H, W)
  FRSKD_INPUTS(x, centre, scale, shift)
  FRSKD_OUTPUTS(out)
};

// Sums over the pixels of grad and of grad * (x - centre).
struct ChannelMomentsSums {
  Tensor grad;    // (N, C, H, W)
  Tensor x;       // (N, C, H, W)
  Tensor centre;  // (N, C)
  Tensor plain;   // (N, C)
  Tensor weighted;
  FRSKD_INPUTS(grad, x, centre)
  FRSKD_OUTPUTS(plain, weighted)
};

}  // namespace frskd
