// Entry points of the weighted fusion on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "../common/fusion_math.h"
#include "checks.h"
#include "fusion_call.h"
#include "threads.h"

namespace frskd {
namespace {

// Beyond it nearest-neighbour indices, computed in float32 as PyTorch does, are no longer exact.
constexpr std::int64_t kLongestSide = std::int64_t{1} << 24;

// (>= rows, C) or (C,) numbers of the accumulate type; null where the tensor is empty.
const void* channel_numbers(
    const Tensor& tensor, Element element, std::int64_t rows, std::int64_t channels, const char* name) {
  if (tensor.numel() == 0) return nullptr;
  STD_TORCH_CHECK(
      tensor.numel() >= rows * channels && tensor.numel() % channels == 0, name, " has shape ", shape_text(tensor),
      ", but ", rows, " rows of ", channels, " channels were wanted.");
  return working_tensor(tensor, element, tensor.numel(), name);
}

Fusion fusion_of(
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& statistics,
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,
    const std::vector<std::int64_t>& resamples,
    std::int64_t pre,
    std::int64_t act,
    std::int64_t weighting,
    double epsilon,
    const Tensor& out,
    Element& element,
    const char* out_name) {
  const std::size_t count = inputs.size();
  STD_TORCH_CHECK(
      count >= 1 && count <= static_cast<std::size_t>(kMostFusionInputs), "inputs has ", count, " maps, but 1 to ",
      kMostFusionInputs, " were wanted.");
  STD_TORCH_CHECK(
      statistics.size() == count && gammas.size() == count && betas.size() == count && resamples.size() == count,
      "statistics, gammas, betas and resamples must have one entry for each of the ", count, " inputs.");
  STD_TORCH_CHECK(pre >= 0 && pre <= 2, "pre is ", pre, ", but 0, 1 or 2 was wanted.");
  STD_TORCH_CHECK(act >= 0 && act <= 2, "act is ", act, ", but 0, 1 or 2 was wanted.");
  STD_TORCH_CHECK(weighting >= 0 && weighting <= 3, "weighting is ", weighting, ", but 0 to 3 was wanted.");
  check_number(epsilon, 0.0, "epsilon");
  element = element_of(inputs[0], "inputs");
  Fusion call{};
  call.count = static_cast<int>(count);
  call.out = map_of(out, element, 4, out_name);
  call.batch = out.sizes()[0];
  call.pre = static_cast<int>(pre);
  call.act = static_cast<int>(act);
  call.weighting = static_cast<int>(weighting);
  call.epsilon = epsilon;
  call.weight = working_tensor(weight, element, static_cast<std::int64_t>(count), "weight");
  STD_TORCH_CHECK(
      call.out.channels > 0 && call.out.height > 0 && call.out.width > 0 && call.out.height <= kLongestSide &&
          call.out.width <= kLongestSide,
      out_name, " has shape ", shape_text(out), ", but at least one channel and pixel were wanted.");
  for (std::size_t i = 0; i < count; ++i) {
    FusionInput& input = call.inputs[i];
    input.map = map_of(inputs[i], element, 4, "inputs");
    const Map& map = input.map;
    STD_TORCH_CHECK(
        inputs[i].sizes()[0] == call.batch && map.channels == call.out.channels, "inputs[", i, "] has shape ",
        shape_text(inputs[i]), ", but the batch and channels of ", out_name, " ", shape_text(out), " were wanted.");
    STD_TORCH_CHECK(
        resamples[i] >= 0 && resamples[i] <= 2, "resamples[", i, "] is ", resamples[i], ", but 0, 1 or 2 was wanted.");
    input.resample = static_cast<int>(resamples[i]);
    const auto fits = [&input](std::int64_t side, std::int64_t wanted) {
      return input.resample == kResampleNone ? side == wanted
             : input.resample == kResampleUp ? side >= 1 && side <= wanted
                                             : side >= 1 && side <= kLongestSide && (side + 1) / 2 == wanted;
    };
    STD_TORCH_CHECK(
        fits(map.height, call.out.height) && fits(map.width, call.out.width), "inputs[", i, "] has shape ",
        shape_text(inputs[i]), ", which its resampling does not bring to that of ", out_name, " ", shape_text(out),
        ".");
    input.statistics = channel_numbers(statistics[i], element, 2, map.channels, "statistics");
    input.gamma = channel_numbers(gammas[i], element, 1, map.channels, "gammas");
    input.beta = channel_numbers(betas[i], element, 1, map.channels, "betas");
    STD_TORCH_CHECK(
        (input.statistics == nullptr) == (input.gamma == nullptr) &&
            (input.statistics == nullptr) == (input.beta == nullptr),
        "inputs[", i, "] must have statistics, gamma and beta, or none of them.");
  }
  return call;
}

// Adds the depthwise convolution behind the fused map. Only maps whose channels are contiguous are convolved here.
void add_depthwise(Fusion& call, Element element, const Tensor& depthwise) {
  STD_TORCH_CHECK(call.act == kActivationNone, "act is ", call.act, ", but 0 was wanted in front of a convolution.");
  bool contiguous = call.out.channels > 1 && call.out.stride_c == 1;
  for (int i = 0; i < call.count; ++i) contiguous = contiguous && call.inputs[i].map.stride_c == 1;
  STD_TORCH_CHECK(contiguous, "depthwise is given, but all maps must then have two channels or more, of stride 1.");
  call.depthwise = working_tensor(depthwise, element, 9 * call.out.channels, "depthwise");
}

void fusion_statistics(
    std::vector<Tensor> inputs, std::vector<double> epsilons, std::vector<Tensor> statistics, std::optional<Tensor>) {
  STD_TORCH_CHECK(
      epsilons.size() == inputs.size() && statistics.size() == inputs.size(),
      "epsilons and statistics must have one entry for each of the ", inputs.size(), " inputs.");
  std::vector<FusionStatistics> calls;
  std::vector<Element> elements;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Element element = element_of(inputs[i], "inputs");
    const Map map = map_of(inputs[i], element, 4, "inputs");
    const std::int64_t batch = inputs[i].sizes()[0];
    STD_TORCH_CHECK(
        batch > 0 && map.channels > 0 && map.height > 0 && map.width > 0, "inputs[", i, "] has shape ",
        shape_text(inputs[i]), ", but at least one sample, channel and pixel were wanted.");
    check_number(epsilons[i], 0.0, "epsilons");
    calls.push_back({map, batch, epsilons[i], working_tensor(statistics[i], element, 3 * map.channels, "statistics")});
    elements.push_back(element);
  }
  for (std::size_t i = 0; i < calls.size(); ++i) {
    kernels<FusionKernels>().statistics(calls[i], elements[i], run_parallel, thread_count());
  }
}

void fusion_forward(
    std::vector<Tensor> inputs,
    std::vector<Tensor> statistics,
    std::vector<Tensor> gammas,
    std::vector<Tensor> betas,
    Tensor weight,
    std::vector<std::int64_t> resamples,
    std::int64_t pre,
    std::int64_t act,
    std::int64_t weighting,
    double epsilon,
    Tensor out,
    std::optional<Tensor> depthwise) {
  Element element;
  Fusion call = fusion_of(
      inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, out, element, "out");
  if (depthwise) add_depthwise(call, element, *depthwise);
  kernels<FusionKernels>().forward(call, element, run_parallel, thread_count());
}

void fusion_backward_sums(
    Tensor grad,
    std::vector<Tensor> inputs,
    std::vector<Tensor> statistics,
    std::vector<Tensor> gammas,
    std::vector<Tensor> betas,
    Tensor weight,
    std::vector<std::int64_t> resamples,
    std::int64_t pre,
    std::int64_t act,
    std::int64_t weighting,
    double epsilon,
    std::vector<Tensor> sums,
    Tensor weight_gradient,
    std::optional<Tensor>,
    std::optional<Tensor> depthwise,
    std::optional<Tensor> depthwise_gradient,
    std::optional<Tensor> map_gradient) {
  Element element;
  Fusion call = fusion_of(
      inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, grad, element, "grad");
  STD_TORCH_CHECK(sums.size() == inputs.size(), "sums must have one entry for each of the ", inputs.size(), " inputs.");
  for (int i = 0; i < call.count; ++i) {
    const std::int64_t wanted = call.inputs[i].statistics == nullptr ? 0 : 2 * call.out.channels;
    void* place = working_tensor(sums[i], element, wanted, "sums");
    call.inputs[i].sums_out = wanted == 0 ? nullptr : place;
  }
  call.weight_gradient = working_tensor(weight_gradient, element, call.count, "weight_gradient");
  STD_TORCH_CHECK(
      depthwise.has_value() == depthwise_gradient.has_value() && depthwise.has_value() == map_gradient.has_value(),
      "depthwise, depthwise_gradient and map_gradient must be given together, or none of them.");
  if (depthwise) {
    add_depthwise(call, element, *depthwise);
    call.depthwise_gradient = working_tensor(*depthwise_gradient, element, 9 * call.out.channels, "depthwise_gradient");
    call.map_gradient = map_of(*map_gradient, element, 4, "map_gradient");
    const Map& map = call.map_gradient;
    STD_TORCH_CHECK(
        map_gradient->sizes()[0] == call.batch && map.channels == call.out.channels && map.height == call.out.height &&
            map.width == call.out.width && map.stride_c == 1,
        "map_gradient has shape ", shape_text(*map_gradient), ", but that of grad ", shape_text(grad),
        ", with channels of stride 1, was wanted.");
  }
  kernels<FusionKernels>().backward(call, element, run_parallel, thread_count());
}

void fusion_backward(
    Tensor grad,
    std::vector<Tensor> inputs,
    std::vector<Tensor> statistics,
    std::vector<Tensor> gammas,
    std::vector<Tensor> betas,
    Tensor weight,
    std::vector<Tensor> sums,
    std::vector<std::int64_t> resamples,
    std::int64_t pre,
    std::int64_t act,
    std::int64_t weighting,
    double epsilon,
    std::vector<std::int64_t> positions,
    std::vector<Tensor> gradients,
    std::optional<Tensor> weight_gradient,
    std::optional<Tensor>) {
  Element element;
  Fusion call = fusion_of(
      inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, grad, element, "grad");
  STD_TORCH_CHECK(sums.size() == inputs.size(), "sums must have one entry for each of the ", inputs.size(), " inputs.");
  STD_TORCH_CHECK(
      positions.size() == gradients.size(), "gradients has ", gradients.size(), " entries, but positions has ",
      positions.size(), ".");
  for (int i = 0; i < call.count; ++i) {
    if (sums[i].numel() == 0) continue;
    STD_TORCH_CHECK(
        call.inputs[i].statistics != nullptr, "sums[", i, "] is given, but inputs[", i, "] has no statistics.");
    call.inputs[i].sums = working_tensor(sums[i], element, 2 * call.out.channels, "sums");
  }
  for (std::size_t k = 0; k < positions.size(); ++k) {
    STD_TORCH_CHECK(
        positions[k] >= 0 && positions[k] < call.count, "positions[", k, "] is ", positions[k], ", but one of the ",
        call.count, " inputs was wanted.");
    FusionInput& input = call.inputs[positions[k]];
    const Map gradient = map_of(gradients[k], element, 4, "gradients");
    STD_TORCH_CHECK(
        gradients[k].sizes()[0] == call.batch && gradient.channels == input.map.channels &&
            gradient.height == input.map.height && gradient.width == input.map.width,
        "gradients[", k, "] has shape ", shape_text(gradients[k]), ", but that of inputs[", positions[k], "] ",
        shape_text(inputs[positions[k]]), " was wanted.");
    STD_TORCH_CHECK(input.gradient.channels == 0, "positions names input ", positions[k], " twice.");
    input.gradient = gradient;
  }
  if (weight_gradient) call.weight_gradient = working_tensor(*weight_gradient, element, call.count, "weight_gradient");
  kernels<FusionKernels>().backward(call, element, run_parallel, thread_count());
}

}  // namespace
}  // namespace frskd

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CPU, m) {
  m.impl("fusion_statistics", TORCH_BOX(&frskd::fusion_statistics));
  m.impl("fusion_forward", TORCH_BOX(&frskd::fusion_forward));
  m.impl("fusion_backward_sums", TORCH_BOX(&frskd::fusion_backward_sums));
  m.impl("fusion_backward", TORCH_BOX(&frskd::fusion_backward));
}
