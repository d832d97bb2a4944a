// Checks of a fusion node, shared by the entry points of `fusion` and `fused_convolution`.
#pragma once

#include "../common/fusion_math.h"
#include "../operations/fusion.h"
#include "checks.h"
#include "fusion_call.h"

namespace frskd {

// Beyond it nearest-neighbour indices, computed in float32 as PyTorch does, are no longer exact.
constexpr std::int64_t kLongestSide = std::int64_t{1} << 24;

// (>= rows, C) or (C,) numbers of the accumulate type; null where the tensor is empty.
inline const void* channel_numbers(
    const Tensor& tensor, Element element, std::int64_t rows, std::int64_t channels, const char* name) {
  if (tensor.numel() == 0) return nullptr;
  STD_TORCH_CHECK(
      tensor.numel() >= rows * channels && tensor.numel() % channels == 0, name, " has shape ", shape_text(tensor),
      ", but ", rows, " rows of ", channels, " channels were wanted.");
  return working_tensor(tensor, element, tensor.numel(), name);
}

// A checked node, and the type of its elements.
struct CheckedFusion {
  Fusion call;
  Element element;
};

inline CheckedFusion checked_fusion(
    const FusionNode& node, const FusionSettings& settings, const Tensor& out, const char* out_name) {
  const std::size_t count = node.inputs.size();
  STD_TORCH_CHECK(
      count >= 1 && count <= static_cast<std::size_t>(kMostFusionInputs), "inputs has ", count, " maps, but 1 to ",
      kMostFusionInputs, " were wanted.");
  STD_TORCH_CHECK(
      node.statistics.size() == count && node.gammas.size() == count && node.betas.size() == count &&
          settings.resamples.size() == count,
      "statistics, gammas, betas and resamples must have one entry for each of the ", count, " inputs.");
  STD_TORCH_CHECK(
      settings.pre >= kActivationNone && settings.pre <= kActivationSilu, "pre is ", settings.pre,
      ", but 0, 1 or 2 was wanted.");
  STD_TORCH_CHECK(
      settings.weighting >= kWeightSum && settings.weighting <= kWeightSoftmax, "weighting is ", settings.weighting,
      ", but 0, 1 or 2 was wanted.");
  check_number(settings.epsilon, 0.0, "epsilon");
  const Element element = element_of(node.inputs[0], "inputs");
  Fusion call{};
  call.count = static_cast<int>(count);
  call.out = map_of(out, element, 4, out_name);
  call.batch = out.sizes()[0];
  call.pre = static_cast<int>(settings.pre);
  call.weighting = static_cast<int>(settings.weighting);
  call.epsilon = settings.epsilon;
  call.weight = working_tensor(node.weight, element, static_cast<std::int64_t>(count), "weight");
  STD_TORCH_CHECK(
      call.out.channels > 0 && call.out.height > 0 && call.out.width > 0 && call.out.height <= kLongestSide &&
          call.out.width <= kLongestSide,
      out_name, " has shape ", shape_text(out), ", but at least one channel and pixel were wanted.");
  for (std::size_t i = 0; i < count; ++i) {
    FusionInput& input = call.inputs[i];
    input.map = map_of(node.inputs[i], element, 4, "inputs");
    const Map& map = input.map;
    STD_TORCH_CHECK(
        node.inputs[i].sizes()[0] == call.batch && map.channels == call.out.channels, "inputs[", i, "] has shape ",
        shape_text(node.inputs[i]), ", but the batch and channels of ", out_name, " ", shape_text(out),
        " were wanted.");
    const std::int64_t resample = settings.resamples[i];
    STD_TORCH_CHECK(
        resample >= kResampleNone && resample <= kResamplePool, "resamples[", i, "] is ", resample,
        ", but 0, 1 or 2 was wanted.");
    input.resample = static_cast<int>(resample);
    const auto fits = [&input](std::int64_t side, std::int64_t wanted) {
      return input.resample == kResampleNone ? side == wanted
             : input.resample == kResampleUp ? side >= 1 && side <= wanted
                                             : side >= 1 && side <= kLongestSide && (side + 1) / 2 == wanted;
    };
    STD_TORCH_CHECK(
        fits(map.height, call.out.height) && fits(map.width, call.out.width), "inputs[", i, "] has shape ",
        shape_text(node.inputs[i]), ", which its resampling does not bring to that of ", out_name, " ", shape_text(out),
        ".");
    input.statistics = channel_numbers(node.statistics[i], element, 2, map.channels, "statistics");
    input.gamma = channel_numbers(node.gammas[i], element, 1, map.channels, "gammas");
    input.beta = channel_numbers(node.betas[i], element, 1, map.channels, "betas");
    STD_TORCH_CHECK(
        (input.statistics == nullptr) == (input.gamma == nullptr) &&
            (input.statistics == nullptr) == (input.beta == nullptr),
        "inputs[", i, "] must have statistics, gamma and beta, or none of them.");
  }
  return {call, element};
}

// Where the first backward pass writes its sums, one entry for each input.
inline void add_sums(CheckedFusion& checked, const std::vector<Tensor>& sums, const Tensor& weight_gradient) {
  Fusion& call = checked.call;
  STD_TORCH_CHECK(
      static_cast<int>(sums.size()) == call.count, "sums must have one entry for each of the ", call.count, " inputs.");
  for (int i = 0; i < call.count; ++i) {
    const std::int64_t wanted = call.inputs[i].statistics == nullptr ? 0 : 2 * call.out.channels;
    void* place = working_tensor(sums[i], checked.element, wanted, "sums");
    call.inputs[i].sums_out = wanted == 0 ? nullptr : place;
  }
  call.weight_gradient = working_tensor(weight_gradient, checked.element, call.count, "weight_gradient");
}

}  // namespace frskd
