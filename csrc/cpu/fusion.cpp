// Entry points of the weighted fusion on the CPU.
#include "fusion_checks.h"
#include "threads.h"

namespace frskd {
namespace {

void fusion_statistics(const FusionStatistics& arguments) {
  const std::size_t count = arguments.inputs.size();
  STD_TORCH_CHECK(
      arguments.epsilons.size() == count && arguments.statistics.size() == count,
      "epsilons and statistics must have one entry for each of the ", count, " inputs.");
  std::vector<MapStatistics> calls;
  std::vector<Element> elements;
  for (std::size_t i = 0; i < count; ++i) {
    const Tensor& input = arguments.inputs[i];
    const Element element = element_of(input, "inputs");
    const Map map = map_of(input, element, 4, "inputs");
    const std::int64_t batch = input.sizes()[0];
    STD_TORCH_CHECK(
        batch > 0 && map.channels > 0 && map.height > 0 && map.width > 0, "inputs[", i, "] has shape ",
        shape_text(input), ", but at least one sample, channel and pixel were wanted.");
    const double epsilon = arguments.epsilons[i];
    check_number(epsilon, 0.0, "epsilons");
    void* statistics = working_tensor(arguments.statistics[i], element, 3 * map.channels, "statistics");
    calls.push_back({map, batch, epsilon, statistics});
    elements.push_back(element);
  }
  for (std::size_t i = 0; i < count; ++i) {
    kernels<FusionKernels>().statistics(calls[i], elements[i], run_parallel, thread_count());
  }
}

void fusion_forward(const FusionForward& arguments) {
  const CheckedFusion checked = checked_fusion(arguments.node, arguments.settings, arguments.out, "out");
  kernels<FusionKernels>().forward(checked.call, checked.element, run_parallel, thread_count());
}

void fusion_backward_sums(const FusionBackwardSums& arguments) {
  CheckedFusion checked = checked_fusion(arguments.node, arguments.settings, arguments.grad, "grad");
  add_sums(checked, arguments.sums, arguments.weight_gradient);
  kernels<FusionKernels>().backward(checked.call, checked.element, run_parallel, thread_count());
}

void fusion_backward(const FusionBackward& arguments) {
  CheckedFusion checked = checked_fusion(arguments.node, arguments.settings, arguments.grad, "grad");
  Fusion& call = checked.call;
  const Element element = checked.element;
  const std::vector<Tensor>&sums = arguments.sums, &gradients = arguments.gradients;
  const std::vector<std::int64_t>& positions = arguments.positions;
  STD_TORCH_CHECK(
      static_cast<int>(sums.size()) == call.count, "sums must have one entry for each of the ", call.count, " inputs.");
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
        shape_text(arguments.node.inputs[positions[k]]), " was wanted.");
    STD_TORCH_CHECK(input.gradient.channels == 0, "positions names input ", positions[k], " twice.");
    input.gradient = gradient;
  }
  if (arguments.weight_gradient) {
    call.weight_gradient = working_tensor(*arguments.weight_gradient, element, call.count, "weight_gradient");
  }
  kernels<FusionKernels>().backward(call, element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(fusion_statistics)
FRSKD_CPU_OPERATION(fusion_forward)
FRSKD_CPU_OPERATION(fusion_backward_sums)
FRSKD_CPU_OPERATION(fusion_backward)

}  // namespace
}  // namespace frskd
