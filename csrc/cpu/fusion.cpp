// Entry points of the weighted fusion on the CPU.
#include "../operations/fusion_checks.h"
#include "fusion_arguments.h"
#include "threads.h"

namespace frskd {
namespace {

void fusion_statistics(const FusionStatistics& arguments) {
  const Element element = element_of(check(arguments, Device::kCpu).dtype);
  for (std::size_t i = 0; i < arguments.inputs.size(); ++i) {
    const Tensor& input = arguments.inputs[i];
    const MapStatistics call{map_of(input), input.size(0), arguments.epsilons[i], arguments.statistics[i].data_ptr()};
    kernels<FusionKernels>().statistics(call, element, run_parallel, thread_count());
  }
}

void fusion_forward(const FusionForward& arguments) {
  const Element element = element_of(check(arguments, Device::kCpu).dtype);
  const Fusion call = fusion_of(arguments.node, arguments.settings, arguments.out);
  kernels<FusionKernels>().forward(call, element, run_parallel, thread_count());
}

void fusion_backward_sums(const FusionBackwardSums& arguments) {
  const Element element = element_of(check(arguments, Device::kCpu).dtype);
  Fusion call = fusion_of(arguments.node, arguments.settings, arguments.grad);
  add_sums(call, arguments.sums, arguments.weight_gradient);
  kernels<FusionKernels>().backward(call, element, run_parallel, thread_count());
}

void fusion_backward(const FusionBackward& arguments) {
  const Element element = element_of(check(arguments, Device::kCpu).dtype);
  Fusion call = fusion_of(arguments.node, arguments.settings, arguments.grad);
  for (int i = 0; i < call.count; ++i) call.inputs[i].sums = data_or_null(arguments.sums[i]);
  for (std::size_t k = 0; k < arguments.positions.size(); ++k) {
    call.inputs[arguments.positions[k]].gradient = map_of(arguments.gradients[k]);
  }
  call.weight_gradient = data_or_null(arguments.weight_gradient);
  kernels<FusionKernels>().backward(call, element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(fusion_statistics)
FRSKD_CPU_OPERATION(fusion_forward)
FRSKD_CPU_OPERATION(fusion_backward_sums)
FRSKD_CPU_OPERATION(fusion_backward)

}  // namespace
}  // namespace frskd
