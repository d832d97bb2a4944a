// Checks of a fusion node, shared by the operations `fusion` and `fused_convolution`.
#pragma once

#include "../common/fusion_math.h"
#include "checks.h"
#include "fusion.h"

namespace frskd {

// Beyond it nearest-neighbour indices, computed in float32 as PyTorch does, are no longer exact.
constexpr std::int64_t kLongestSide = std::int64_t{1} << 24;

// A map whose batch and channels are those of the node's first input.
inline void check_fusion_map(const Tensor& map, const Name& name, const Kind& kind, const Tensor& first) {
  check_map(map, name, kind);
  STD_TORCH_CHECK(
      map.size(0) == first.size(0) && map.size(1) == first.size(1), name, " has shape ", shape_text(map),
      ", but batch size ", first.size(0), " and ", first.size(1), " channels, those of inputs[0], were wanted.");
  constexpr std::int64_t kLimit = std::int64_t{1} << 30;
  STD_TORCH_CHECK(
      kind.device == Device::kCpu || (map.size(0) <= kLimit && map.size(1) * map.size(2) * map.size(3) <= kLimit), name,
      " has shape ", shape_text(map), ", but at most 2^30 samples of at most 2^30 elements were wanted.");
}

inline void check_sides(const Tensor& map, const Name& name) {
  STD_TORCH_CHECK(
      map.size(2) <= kLongestSide && map.size(3) <= kLongestSide, name, " has shape ", shape_text(map),
      ", but sides of at most 2^24 were wanted.");
}

inline Kind check_inputs(const std::vector<Tensor>& inputs, Device device) {
  STD_TORCH_CHECK(
      !inputs.empty() && inputs.size() <= static_cast<std::size_t>(kMostFusionInputs), "inputs has ", inputs.size(),
      " entries, but 1 to ", kMostFusionInputs, " were wanted.");
  const Kind kind = kind_of(inputs[0], {"inputs", 0}, device);
  for (std::size_t i = 0; i < inputs.size(); ++i) check_fusion_map(inputs[i], {"inputs", i}, kind, inputs[0]);
  return kind;
}

// `output` is the output or its gradient.
inline Kind check(
    const FusionNode& node,
    const FusionSettings& settings,
    const Tensor& output,
    const char* output_name,
    Device device) {
  const std::vector<Tensor>& inputs = node.inputs;
  const Kind kind = check_inputs(inputs, device);
  const std::int64_t channels = inputs[0].size(1);
  check_count(node.statistics.size(), "statistics", inputs.size());
  check_count(node.gammas.size(), "gammas", inputs.size());
  check_count(node.betas.size(), "betas", inputs.size());
  check_count(settings.resamples.size(), "resamples", inputs.size());
  check_between<std::int64_t>(settings.pre, "pre", kActivationNone, kActivationSilu);
  check_between<std::int64_t>(settings.weighting, "weighting", kWeightSum, kWeightSoftmax);
  check_at_least(settings.epsilon, "epsilon", 0.0);
  check_numbers(node.weight, "weight", kind, {static_cast<std::int64_t>(inputs.size())});
  check_fusion_map(output, output_name, kind, inputs[0]);
  check_sides(output, output_name);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    check_sides(inputs[i], {"inputs", i});
    const std::int64_t resample = settings.resamples[i];
    check_between<std::int64_t>(resample, {"resamples", i}, kResampleNone, kResamplePool);
    const auto fits = [&](std::int64_t axis) {
      const std::int64_t side = inputs[i].size(axis), wanted = output.size(axis);
      return resample == kResampleNone ? side == wanted
             : resample == kResampleUp ? side <= wanted
                                       : (side + 1) / 2 == wanted;
    };
    const char* wanted = resample == kResampleNone ? "the same size"
                         : resample == kResampleUp ? "at most that size"
                                                   : "a size whose half, rounded up, is that";
    STD_TORCH_CHECK(
        fits(2) && fits(3), Name("inputs", i), " has shape ", shape_text(inputs[i]), ", but ", output_name, " has ",
        shape_text(output), " and ", wanted, " was wanted.");
    const Tensor &statistics = node.statistics[i], &gamma = node.gammas[i], &beta = node.betas[i];
    const Name names[3] = {{"statistics", i}, {"gammas", i}, {"betas", i}};
    check_device(statistics, names[0], kind);
    check_device(gamma, names[1], kind);
    check_device(beta, names[2], kind);
    const bool normalised = statistics.numel() > 0;
    STD_TORCH_CHECK(
        (gamma.numel() > 0) == normalised && (beta.numel() > 0) == normalised, names[0], ", ", names[1], " and ",
        names[2], " have ", statistics.numel(), ", ", gamma.numel(), " and ", beta.numel(),
        " elements, but either all of them or none were wanted.");
    if (!normalised) continue;
    STD_TORCH_CHECK(
        statistics.dim() == 2 && statistics.size(0) >= 2, names[0], " has shape ", shape_text(statistics), ", but (2, ",
        channels, ") or more rows were wanted.");
    check_numbers(statistics, names[0], kind, {statistics.size(0), channels});
    check_numbers(gamma, names[1], kind, {channels});
    check_numbers(beta, names[2], kind, {channels});
  }
  return kind;
}

// `sums` are those of the normalised inputs; where they may be missing, the statistics are constants.
inline void check_sums(const FusionNode& node, const Kind& kind, const std::vector<Tensor>& sums, bool may_be_missing) {
  check_count(sums.size(), "sums", node.inputs.size());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const Name name{"sums", i};
    check_device(sums[i], name, kind);
    const bool normalised = node.statistics[i].numel() > 0;
    if (sums[i].numel() == 0 && (may_be_missing || !normalised)) continue;
    STD_TORCH_CHECK(
        normalised, name, " has shape ", shape_text(sums[i]), ", but ", Name("inputs", i),
        " is not normalised and an empty tensor was wanted.");
    check_numbers(sums[i], name, kind, {2, node.inputs[0].size(1)});
  }
}

inline void check_weight_gradient(const FusionNode& node, const Kind& kind, const Tensor& weight_gradient) {
  check_numbers(weight_gradient, "weight_gradient", kind, {static_cast<std::int64_t>(node.inputs.size())});
}

inline void check_workspace(const std::optional<Tensor>& workspace, const Kind& kind) {
  if (workspace.has_value()) check_numbers(*workspace, "workspace", kind, {workspace->numel()});
}

inline Kind check(const FusionStatistics& call, Device device) {
  const Kind kind = check_inputs(call.inputs, device);
  check_count(call.epsilons.size(), "epsilons", call.inputs.size());
  check_count(call.statistics.size(), "statistics", call.inputs.size());
  for (std::size_t i = 0; i < call.inputs.size(); ++i) {
    STD_TORCH_CHECK(
        call.inputs[i].size(0) > 0, Name("inputs", i), " has shape ", shape_text(call.inputs[i]),
        ", but at least one sample was wanted.");
    check_at_least(call.epsilons[i], {"epsilons", i}, 0.0);
    check_numbers(call.statistics[i], {"statistics", i}, kind, {3, call.inputs[0].size(1)});
  }
  check_workspace(call.workspace, kind);
  return kind;
}

inline Kind check(const FusionForward& call, Device device) {
  return check(call.node, call.settings, call.out, "out", device);
}

inline Kind check(const FusionBackwardSums& call, Device device) {
  const Kind kind = check(call.node, call.settings, call.grad, "grad", device);
  check_sums(call.node, kind, call.sums, false);
  check_weight_gradient(call.node, kind, call.weight_gradient);
  check_workspace(call.workspace, kind);
  return kind;
}

inline Kind check(const FusionBackward& call, Device device) {
  const Kind kind = check(call.node, call.settings, call.grad, "grad", device);
  check_sums(call.node, kind, call.sums, true);
  check_count(call.gradients.size(), "gradients", call.positions.size());
  const std::int64_t last = static_cast<std::int64_t>(call.node.inputs.size()) - 1;
  for (std::size_t k = 0; k < call.positions.size(); ++k) {
    check_between<std::int64_t>(call.positions[k], {"positions", k}, 0, last);
    STD_TORCH_CHECK(
        k == 0 || call.positions[k] > call.positions[k - 1], "positions holds ", call.positions[k], " after ",
        call.positions[k - 1], ", but rising numbers were wanted.");
    check_like(call.gradients[k], {"gradients", k}, kind, kind.dtype, call.node.inputs[call.positions[k]]);
  }
  if (call.weight_gradient.has_value()) check_weight_gradient(call.node, kind, *call.weight_gradient);
  check_workspace(call.workspace, kind);
  return kind;
}

}  // namespace frskd
