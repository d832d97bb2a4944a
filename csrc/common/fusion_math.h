// Scalar arithmetic of weighted fusion, shared by the host and device kernels.
// A is the accumulate type: float, or double for float64 inputs.
#pragma once

#include "config.h"

namespace frskd {

constexpr int kMostFusionInputs = 4;

enum FusionResample { kResampleNone = 0, kResampleUp = 1, kResamplePool = 2 };
enum FusionActivation { kActivationNone = 0, kActivationRelu = 1, kActivationSilu = 2 };
enum FusionWeighting { kWeightSum = 0, kWeightRelu = 1, kWeightSoftmax = 2 };

// Where nearest-neighbour up-sampling reads the output index `destination`; rounded as PyTorch rounds it.
FRSKD_HOST_DEVICE int nearest_source(int destination, int source_size, int output_size) {
  const float scale = static_cast<float>(source_size) / static_cast<float>(output_size);
  const int source = static_cast<int>(static_cast<float>(destination) * scale);
  return source < source_size ? source : source_size - 1;
}

// The first output index that reads `source` or a later one; the outputs of `source` are
// [first_destination(source), first_destination(source + 1)).
FRSKD_HOST_DEVICE int first_destination(int source, int source_size, int output_size) {
  if (source >= source_size) return output_size;
  long long guess = (static_cast<long long>(source) * output_size + source_size - 1) / source_size;
  int destination = static_cast<int>(guess);
  while (destination > 0 && nearest_source(destination - 1, source_size, output_size) >= source) --destination;
  while (destination < output_size && nearest_source(destination, source_size, output_size) < source) ++destination;
  return destination;
}

// w^ from w, and what its gradient divides by.
template <typename A>
struct FusionWeights {
  A normalised[kMostFusionInputs];
  A divisor;     // sum relu(w) + epsilon, where `relu` holds
  bool relu;     // normalised by the sum of the positive weights
  bool softmax;  // gradient of softmax
};

// `exponential` is the platform's exp for A.
template <typename A, typename Exponential>
FRSKD_HOST_DEVICE FusionWeights<A> normalise_fusion_weights(
    const A* weight, int count, int weighting, A epsilon, Exponential exponential) {
  FusionWeights<A> result;
  result.divisor = A(1);
  result.relu = result.softmax = false;
  for (int i = 0; i < kMostFusionInputs; ++i) result.normalised[i] = i < count ? A(1) : A(0);
  if (weighting == kWeightSum) return result;
  A largest = weight[0];
  for (int i = 1; i < count; ++i) largest = weight[i] > largest ? weight[i] : largest;
  result.softmax = weighting == kWeightSoftmax;
  result.relu = !result.softmax;
  A total = A(0);
  for (int i = 0; i < count; ++i) {
    A value;
    if (result.softmax) {
      value = exponential(weight[i] - largest);
    } else {
      // Written so that a NaN weight stays NaN.
      value = weight[i] < A(0) ? A(0) : weight[i];
    }
    result.normalised[i] = value;
    total += value;
  }
  result.divisor = result.relu ? total + epsilon : total;
  for (int i = 0; i < count; ++i) result.normalised[i] /= result.divisor;
  return result;
}

// d loss / d w from D_i = d loss / d w^_i.
template <typename A>
FRSKD_HOST_DEVICE void fusion_weight_gradient(
    const FusionWeights<A>& weights, const A* weight, const A* derivative, int count, A* gradient) {
  A projection = A(0);
  for (int i = 0; i < count; ++i) projection += derivative[i] * weights.normalised[i];
  for (int i = 0; i < count; ++i) {
    if (weights.softmax) {
      gradient[i] = weights.normalised[i] * (derivative[i] - projection);
    } else if (weights.relu) {
      gradient[i] = weight[i] <= A(0) ? A(0) : (derivative[i] - projection) / weights.divisor;
    } else {
      gradient[i] = A(0);
    }
  }
}

}  // namespace frskd
