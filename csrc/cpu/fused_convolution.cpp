// Entry points of a fusion node with a depthwise convolution behind it, on the CPU.
#include "../operations/fused_convolution.h"

#include "../operations/fusion_checks.h"
#include "fused_convolution_call.h"
#include "fusion_arguments.h"
#include "threads.h"

namespace frskd {
namespace {

// Only maps whose channels are contiguous are convolved here.
void check_convolved(const Fusion& call, const Tensor& depthwise, const Kind& kind) {
  check_numbers(depthwise, "depthwise", kind, {call.out.channels, 1, 3, 3});
  bool contiguous = call.out.channels > 1 && call.out.stride_c == 1;
  for (int i = 0; i < call.count; ++i) contiguous = contiguous && call.inputs[i].map.stride_c == 1;
  STD_TORCH_CHECK(contiguous, "depthwise is given, but all maps must then have two channels or more, of stride 1.");
}

void fused_convolution_forward(const FusedConvolutionForward& arguments) {
  const Kind kind = check(arguments.node, arguments.settings, arguments.out, "out", Device::kCpu);
  const Fusion call = fusion_of(arguments.node, arguments.settings, arguments.out);
  check_convolved(call, arguments.depthwise, kind);
  FusedConvolution convolution{};
  convolution.weight = arguments.depthwise.data_ptr();
  kernels<FusedConvolutionKernels>().forward(call, convolution, element_of(kind.dtype), run_parallel, thread_count());
}

void fused_convolution_backward_sums(const FusedConvolutionBackwardSums& arguments) {
  const Kind kind = check(arguments.node, arguments.settings, arguments.grad, "grad", Device::kCpu);
  check_sums(arguments.node, kind, arguments.sums, false);
  check_weight_gradient(arguments.node, kind, arguments.weight_gradient);
  Fusion call = fusion_of(arguments.node, arguments.settings, arguments.grad);
  add_sums(call, arguments.sums, arguments.weight_gradient);
  check_convolved(call, arguments.depthwise, kind);
  check_numbers(arguments.depthwise_gradient, "depthwise_gradient", kind, {call.out.channels, 1, 3, 3});
  check_like(arguments.map_gradient, "map_gradient", kind, kind.dtype, arguments.grad);
  STD_TORCH_CHECK(
      arguments.map_gradient.stride(1) == 1, "map_gradient has channels of stride ", arguments.map_gradient.stride(1),
      ", but 1 was wanted.");
  const FusedConvolution convolution{
      arguments.depthwise.data_ptr(), arguments.depthwise_gradient.data_ptr(), map_of(arguments.map_gradient)};
  kernels<FusedConvolutionKernels>().backward(call, convolution, element_of(kind.dtype), run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(fused_convolution_forward)
FRSKD_CPU_OPERATION(fused_convolution_backward_sums)

}  // namespace
}  // namespace frskd
