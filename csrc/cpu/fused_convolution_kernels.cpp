#include "fused_convolution_kernel.h"

namespace frskd {
namespace {

void fused_convolution_forward(
    const Fusion& call, const FusedConvolution& convolution, Element element, ParallelFor run, int) {
  with_element(
      element, [&](auto value, auto sum) { convolve_forward<decltype(value), decltype(sum)>(call, convolution, run); });
}

void fused_convolution_backward(
    const Fusion& call, const FusedConvolution& convolution, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) {
    convolve_backward<decltype(value), decltype(sum)>(call, convolution, run);
  });
}

}  // namespace

FRSKD_DEFINE_KERNELS(FusedConvolutionKernels) = {fused_convolution_forward, fused_convolution_backward};
}  // namespace frskd
