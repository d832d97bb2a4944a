// Entry points of a fusion node with a depthwise convolution behind it, on the CPU.
#include "../operations/fused_convolution.h"

#include "fused_convolution_call.h"
#include "fusion_checks.h"
#include "threads.h"

namespace frskd {
namespace {

constexpr std::int64_t kTaps = 9;  // of the convolution

// Only maps whose channels are contiguous are convolved here.
void check_channels_last(const Fusion& call) {
  bool contiguous = call.out.channels > 1 && call.out.stride_c == 1;
  for (int i = 0; i < call.count; ++i) contiguous = contiguous && call.inputs[i].map.stride_c == 1;
  STD_TORCH_CHECK(contiguous, "depthwise is given, but all maps must then have two channels or more, of stride 1.");
}

void fused_convolution_forward(const FusedConvolutionForward& arguments) {
  const CheckedFusion checked = checked_fusion(arguments.node, arguments.settings, arguments.out, "out");
  const Fusion& call = checked.call;
  check_channels_last(call);
  FusedConvolution convolution{};
  convolution.weight = working_tensor(arguments.depthwise, checked.element, kTaps * call.out.channels, "depthwise");
  kernels<FusedConvolutionKernels>().forward(call, convolution, checked.element, run_parallel, thread_count());
}

void fused_convolution_backward_sums(const FusedConvolutionBackwardSums& arguments) {
  CheckedFusion checked = checked_fusion(arguments.node, arguments.settings, arguments.grad, "grad");
  const Fusion& call = checked.call;
  const Element element = checked.element;
  const std::int64_t taps = kTaps * call.out.channels;
  add_sums(checked, arguments.sums, arguments.weight_gradient);
  check_channels_last(call);
  FusedConvolution convolution{};
  convolution.weight = working_tensor(arguments.depthwise, element, taps, "depthwise");
  convolution.weight_gradient = working_tensor(arguments.depthwise_gradient, element, taps, "depthwise_gradient");
  convolution.map_gradient = map_of(arguments.map_gradient, element, 4, "map_gradient");
  const Map& map = convolution.map_gradient;
  STD_TORCH_CHECK(
      arguments.map_gradient.sizes()[0] == call.batch && map.channels == call.out.channels &&
          map.height == call.out.height && map.width == call.out.width && map.stride_c == 1,
      "map_gradient has shape ", shape_text(arguments.map_gradient), ", but that of grad ", shape_text(arguments.grad),
      ", with channels of stride 1, was wanted.");
  kernels<FusedConvolutionKernels>().backward(call, convolution, element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(fused_convolution_forward)
FRSKD_CPU_OPERATION(fused_convolution_backward_sums)

}  // namespace
}  // namespace frskd
