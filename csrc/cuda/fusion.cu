// Weighted fusion: what the kernels' callers must keep to, and the registration.
#include "../operations/fusion.h"
#include "fusion_backward.cuh"
#include "fusion_forward.cuh"
#include "fusion_statistics.cuh"

namespace frskd::cuda {

namespace {

void check_map(const Tensor& map, const std::string& name, const Tensor& first, ScalarType dtype) {
  check_device(map, name, first);
  check_dtype(map, name, dtype);
  STD_TORCH_CHECK(map.dim() == 4, name, " has shape ", shape_of(map), ", but (N, C, H, W) was wanted.");
  STD_TORCH_CHECK(
      map.size(0) == first.size(0) && map.size(1) == first.size(1), name, " has shape ", shape_of(map),
      ", but batch size ", first.size(0), " and ", first.size(1), " channels, those of inputs[0], were wanted.");
  STD_TORCH_CHECK(
      map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, name, " has shape ", shape_of(map),
      ", but at least one channel and one pixel were wanted.");
  STD_TORCH_CHECK(
      map.size(0) <= kLimit && map.size(1) <= kLimit && map.size(2) <= kLimit && map.size(3) <= kLimit &&
          map.size(2) * map.size(3) <= kLimit && map.size(1) * map.size(2) * map.size(3) <= kLimit,
      name, " has shape ", shape_of(map), ", but at most 2^30 samples of at most 2^30 elements are supported.");
}

void check_inputs(const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(
      !inputs.empty() && inputs.size() <= kMostFusionInputs, "inputs has ", inputs.size(), " tensors, but 1 to ",
      kMostFusionInputs, " were wanted.");
  STD_TORCH_CHECK(inputs[0].defined(), "inputs[0] is an undefined tensor, but a CUDA tensor was wanted.");
  STD_TORCH_CHECK(inputs[0].dim() == 4, "inputs[0] has shape ", shape_of(inputs[0]), ", but (N, C, H, W) was wanted.");
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_map(inputs[i], name_of("inputs", i), inputs[0], inputs[0].scalar_type());
  }
}

void check_choice(int64_t value, const std::string& name, int64_t choices) {
  STD_TORCH_CHECK(
      value >= 0 && value < choices, name, " is ", value, ", but a number from 0 to ", choices - 1, " was wanted.");
}

// `output` is the output or its gradient.
void check_node(const FusionNode& node, const FusionSettings& settings, const Tensor& output, const char* output_name) {
  const std::vector<Tensor>& inputs = node.inputs;
  check_inputs(inputs);
  const int64_t channels = inputs[0].size(1);
  const ScalarType dtype = inputs[0].scalar_type(), accumulate = accumulate_dtype(dtype);
  check_count(node.statistics.size(), "statistics", inputs.size());
  check_count(node.gammas.size(), "gammas", inputs.size());
  check_count(node.betas.size(), "betas", inputs.size());
  STD_TORCH_CHECK(
      settings.resamples.size() == inputs.size(), "resamples has ", settings.resamples.size(), " numbers, but ",
      inputs.size(), " were wanted.");
  check_choice(settings.pre, "pre", 3);
  check_choice(settings.weighting, "weighting", 3);
  check_contiguous(node.weight, "weight", inputs[0], accumulate, {static_cast<int64_t>(inputs.size())});
  check_map(output, output_name, inputs[0], dtype);
  const int64_t height = output.size(2), width = output.size(3);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = name_of("inputs", i);
    check_choice(settings.resamples[i], name_of("resamples", i), 3);
    const int64_t input_height = inputs[i].size(2), input_width = inputs[i].size(3);
    const bool fits = settings.resamples[i] == kResampleNone ? input_height == height && input_width == width
                      : settings.resamples[i] == kResampleUp
                          ? input_height <= height && input_width <= width
                          : (input_height + 1) / 2 == height && (input_width + 1) / 2 == width;
    const char* wanted = settings.resamples[i] == kResampleNone ? "the same size"
                         : settings.resamples[i] == kResampleUp ? "at most that size"
                                                                : "a size whose half, rounded up, is that";
    STD_TORCH_CHECK(
        fits, name, " has shape ", shape_of(inputs[i]), ", but ", output_name, " has ", shape_of(output), " and ",
        wanted, " was wanted.");
    const Tensor* const affine[3] = {&node.statistics[i], &node.gammas[i], &node.betas[i]};
    const char* const names[3] = {"statistics", "gammas", "betas"};
    for (int k = 0; k < 3; ++k) check_device(*affine[k], name_of(names[k], i), inputs[0]);
    const bool normalised = affine[0]->numel() > 0;
    for (int k = 1; k < 3; ++k) {
      STD_TORCH_CHECK(
          (affine[k]->numel() > 0) == normalised, name_of(names[k], i), " has ", affine[k]->numel(), " elements and ",
          name_of("statistics", i), " ", affine[0]->numel(), ", but either all of them or none were wanted.");
    }
    if (!normalised) continue;
    STD_TORCH_CHECK(
        affine[0]->dim() == 2 && affine[0]->size(0) >= 2, name_of("statistics", i), " has shape ", shape_of(*affine[0]),
        ", but (2, ", channels, ") or more rows were wanted.");
    check_contiguous(*affine[0], name_of("statistics", i), inputs[0], accumulate, {affine[0]->size(0), channels});
    for (int k = 1; k < 3; ++k) {
      check_contiguous(*affine[k], name_of(names[k], i), inputs[0], accumulate, {channels});
    }
  }
}

// `sums` are those of the normalised inputs; where they may be missing, the statistics are constants.
void check_sums(const FusionNode& node, const std::vector<Tensor>& sums, bool may_be_missing) {
  const Tensor& first = node.inputs[0];
  check_count(sums.size(), "sums", node.inputs.size());
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const std::string name = name_of("sums", i);
    check_device(sums[i], name, first);
    if (sums[i].numel() == 0 && (may_be_missing || node.statistics[i].numel() == 0)) continue;
    STD_TORCH_CHECK(
        node.statistics[i].numel() > 0, name, " has shape ", shape_of(sums[i]), ", but ", name_of("inputs", i),
        " is not normalised and an empty tensor was wanted.");
    check_contiguous(sums[i], name, first, accumulate_dtype(first.scalar_type()), {2, first.size(1)});
  }
}

void check_weight_gradient(const FusionNode& node, const Tensor& weight_gradient) {
  const Tensor& first = node.inputs[0];
  check_contiguous(
      weight_gradient, "weight_gradient", first, accumulate_dtype(first.scalar_type()),
      {static_cast<int64_t>(node.inputs.size())});
}

void fusion_statistics(const FusionStatistics& call) {
  check_inputs(call.inputs);
  const Tensor& first = call.inputs[0];
  const ScalarType accumulate = accumulate_dtype(first.scalar_type());
  STD_TORCH_CHECK(
      call.epsilons.size() == call.inputs.size(), "epsilons has ", call.epsilons.size(), " numbers, but ",
      call.inputs.size(), " were wanted.");
  check_count(call.statistics.size(), "statistics", call.inputs.size());
  for (size_t i = 0; i < call.inputs.size(); ++i) {
    check_contiguous(call.statistics[i], name_of("statistics", i), first, accumulate, {3, first.size(1)});
  }
  const Workspace room(call.workspace, first, accumulate);
  const DeviceGuard guard(first);
  dispatch_floating(first.scalar_type(), "inputs[0]", [&](auto tag) {
    launch_statistics<typename decltype(tag)::type>(call, room, guard.stream());
  });
}

void fusion_forward(const FusionForward& call) {
  check_node(call.node, call.settings, call.out, "out");
  const Tensor& first = call.node.inputs[0];
  if (first.size(0) == 0) return;
  const DeviceGuard guard(first);
  dispatch_floating(first.scalar_type(), "inputs[0]", [&](auto tag) {
    launch_forward<typename decltype(tag)::type>(call, guard.stream());
  });
}

void fusion_backward_sums(const FusionBackwardSums& call) {
  check_node(call.node, call.settings, call.grad, "grad");
  const Tensor& first = call.node.inputs[0];
  check_sums(call.node, call.sums, false);
  check_weight_gradient(call.node, call.weight_gradient);
  const Workspace room(call.workspace, first, accumulate_dtype(first.scalar_type()));
  const DeviceGuard guard(first);
  dispatch_floating(first.scalar_type(), "inputs[0]", [&](auto tag) {
    launch_backward_sums<typename decltype(tag)::type>(call, room, guard.stream());
  });
}

void fusion_backward(const FusionBackward& call) {
  check_node(call.node, call.settings, call.grad, "grad");
  const std::vector<Tensor>& inputs = call.node.inputs;
  const Tensor& first = inputs[0];
  check_sums(call.node, call.sums, true);
  check_count(call.gradients.size(), "gradients", call.positions.size());
  const Tensor* wanted[kMostFusionInputs] = {};
  for (size_t k = 0; k < call.positions.size(); ++k) {
    check_choice(call.positions[k], name_of("positions", k), static_cast<int64_t>(inputs.size()));
    STD_TORCH_CHECK(
        k == 0 || call.positions[k] > call.positions[k - 1], "positions holds ", call.positions[k], " after ",
        call.positions[k - 1], ", but rising numbers were wanted.");
    const size_t input = static_cast<size_t>(call.positions[k]);
    const std::string name = name_of("gradients", k);
    check_device(call.gradients[k], name, first);
    check_dtype(call.gradients[k], name, first.scalar_type());
    check_same_shape(call.gradients[k], name, inputs[input], name_of("inputs", input));
    wanted[input] = &call.gradients[k];
  }
  if (call.weight_gradient.has_value()) check_weight_gradient(call.node, *call.weight_gradient);
  const Workspace room(call.workspace, first, accumulate_dtype(first.scalar_type()));
  const DeviceGuard guard(first);
  dispatch_floating(first.scalar_type(), "inputs[0]", [&](auto tag) {
    launch_backward<typename decltype(tag)::type>(call, wanted, room, guard.stream());
  });
}

FRSKD_CUDA_OPERATION(fusion_statistics)
FRSKD_CUDA_OPERATION(fusion_forward)
FRSKD_CUDA_OPERATION(fusion_backward_sums)
FRSKD_CUDA_OPERATION(fusion_backward)

}  // namespace

}  // namespace frskd::cuda
