// Entry points of the weighted fusion on a GPU.
#include "../operations/fusion_checks.h"
#include "fusion_backward.cuh"
#include "fusion_forward.cuh"
#include "fusion_statistics.cuh"

namespace frskd::cuda {

namespace {

void fusion_statistics(const FusionStatistics& call) {
  const Kind kind = check(call, Device::kCuda);
  const Workspace room(call.workspace);
  const DeviceGuard guard(call.inputs[0]);
  dispatch_floating(
      kind.dtype, [&](auto tag) { launch_statistics<typename decltype(tag)::type>(call, room, guard.stream()); });
}

void fusion_forward(const FusionForward& call) {
  const Kind kind = check(call, Device::kCuda);
  const Tensor& first = call.node.inputs[0];
  if (first.size(0) == 0) return;
  const DeviceGuard guard(first);
  dispatch_floating(kind.dtype, [&](auto tag) { launch_forward<typename decltype(tag)::type>(call, guard.stream()); });
}

void fusion_backward_sums(const FusionBackwardSums& call) {
  const Kind kind = check(call, Device::kCuda);
  const Workspace room(call.workspace);
  const DeviceGuard guard(call.node.inputs[0]);
  dispatch_floating(
      kind.dtype, [&](auto tag) { launch_backward_sums<typename decltype(tag)::type>(call, room, guard.stream()); });
}

void fusion_backward(const FusionBackward& call) {
  const Kind kind = check(call, Device::kCuda);
  const Tensor* wanted[kMostFusionInputs] = {};
  for (size_t k = 0; k < call.positions.size(); ++k) wanted[call.positions[k]] = &call.gradients[k];
  const Workspace room(call.workspace);
  const DeviceGuard guard(call.node.inputs[0]);
  dispatch_floating(
      kind.dtype, [&](auto tag) { launch_backward<typename decltype(tag)::type>(call, wanted, room, guard.stream()); });
}

FRSKD_CUDA_OPERATION(fusion_statistics)
FRSKD_CUDA_OPERATION(fusion_forward)
FRSKD_CUDA_OPERATION(fusion_backward_sums)
FRSKD_CUDA_OPERATION(fusion_backward)

}  // namespace

}  // namespace frskd::cuda
