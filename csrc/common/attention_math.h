// Arithmetic of the attention-transfer loss, shared by the host kernels (which also use it on vectors) and the device
// kernels.
// A is the accumulate type: float, or double for float64 inputs.
#pragma once

#include "config.h"

namespace frskd {

// torch.nn.functional.normalize divides by max(norm, 1e-12).
constexpr double kNormFloor = 1e-12;

template <typename A>
FRSKD_HOST_DEVICE A clamped_norm(A norm) {
  // Written so that a NaN norm stays NaN.
  return norm < A(kNormFloor) ? A(kNormFloor) : norm;
}

template <typename A>
FRSKD_HOST_DEVICE A inverse_clamped_norm(A norm) {
  return A(1) / clamped_norm(norm);
}

// c = (p / C) * d loss / d a for one pixel, where loss = mean over pixels of (q_own - q_other)^2 and
// q_own = a / max(||a||, floor). `projection` is <q_own, q_own - q_other> over the sample's pixels.
// V is A, or a vector of it.
template <typename V, typename A>
FRSKD_HOST_DEVICE V attention_coefficient(
    V own,         // q_own at the pixel
    V other,       // q_other at the pixel
    A projection,  // <q_own, q_own - q_other>
    A norm,        // ||a_own|| before the clamp
    A scale        // p / C * 2 / (H * W)
) {
  // Below the floor the clamp passes no gradient through the norm.
  const A radial = norm < A(kNormFloor) ? A(0) : projection;
  return scale * ((own - other) - own * radial) * inverse_clamped_norm(norm);
}

}  // namespace frskd
