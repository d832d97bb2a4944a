// The FRSKD objective from its unreduced parts: one block, sums in a fixed order.
#include "../operations/combine_checks.h"
#include "device.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

namespace {

constexpr int kCombineThreads = 512;

template <typename A>
struct CombineParameters {
  const A* attention_losses;  // (L, N)
  const A* logits_losses;     // (4, R): ce_student, ce_teacher, kd, weight
  A* parts;                   // (5,): total, ce_student, ce_teacher, kd, feature
  A* scalars[3];              // the total; or ce_student, ce_teacher, kd
  int scalar_count;           // 1 or 3
  int64_t attention_count;    // L * N
  int64_t samples;            // N
  int64_t rows;               // R
  double alpha;
  double beta;
  bool has_targets;
};

template <typename A>
__global__ void __launch_bounds__(kCombineThreads)
    combine_parts(const __grid_constant__ CombineParameters<A> parameters) {
  __shared__ static double scratch[5 * kCombineThreads / kWarpSize];
  double sums[5] = {};  // ce_student, ce_teacher, kd, weight, attention
  for (int64_t row = threadIdx.x; row < parameters.rows; row += kCombineThreads) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += parameters.logits_losses[i * parameters.rows + row];
  }
  for (int64_t i = threadIdx.x; i < parameters.attention_count; i += kCombineThreads) {
    sums[4] += parameters.attention_losses[i];
  }
  block_sum<kCombineThreads>(sums, scratch);
  if (threadIdx.x != 0) return;

  const double weight = sums[3];
  const double inverse_weight = parameters.has_targets && weight > 0.0 ? 1.0 / weight : 0.0;
  const double ce_student = parameters.has_targets ? sums[0] * inverse_weight : 0.0;
  const double ce_teacher = parameters.has_targets ? sums[1] * inverse_weight : 0.0;
  const double kd = parameters.rows > 0 ? sums[2] / static_cast<double>(parameters.rows) : 0.0;
  const double feature = parameters.samples > 0 ? sums[4] / static_cast<double>(parameters.samples) : 0.0;
  const double total = ce_student + ce_teacher + parameters.alpha * kd + parameters.beta * feature;
  const double parts[5] = {total, ce_student, ce_teacher, kd, feature};
#pragma unroll
  for (int i = 0; i < 5; ++i) parameters.parts[i] = static_cast<A>(parts[i]);
  if (parameters.scalar_count == 1) {
    *parameters.scalars[0] = static_cast<A>(total);
  } else {
#pragma unroll
    for (int i = 0; i < 3; ++i) *parameters.scalars[i] = static_cast<A>(parts[i + 1]);
  }
}

template <typename A>
void launch_combine(const Combine& call) {
  CombineParameters<A> parameters{};
  parameters.attention_losses = static_cast<const A*>(call.attention_losses.data_ptr());
  parameters.logits_losses = static_cast<const A*>(call.logits_losses.data_ptr());
  parameters.parts = static_cast<A*>(call.parts.data_ptr());
  parameters.scalar_count = static_cast<int>(call.scalars.size());
  for (size_t i = 0; i < call.scalars.size(); ++i) {
    parameters.scalars[i] = static_cast<A*>(call.scalars[i].data_ptr());
  }
  parameters.attention_count = call.attention_losses.numel();
  parameters.samples = call.attention_losses.size(1);
  parameters.rows = call.logits_losses.size(1);
  parameters.alpha = call.alpha;
  parameters.beta = call.beta;
  parameters.has_targets = call.has_targets;
  const DeviceGuard guard(call.logits_losses);
  launch(combine_parts<A>, 1, kCombineThreads, 0, guard.stream(), parameters);
}

void combine(const Combine& call) {
  const bool wide = check(call, Device::kCuda).accumulate == ScalarType::Double;
  wide ? launch_combine<double>(call) : launch_combine<float>(call);
}

FRSKD_CUDA_OPERATION(combine)

}  // namespace

}  // namespace frskd::cuda
