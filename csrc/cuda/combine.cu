// The FRSKD objective from its unreduced parts: one block, sums in a fixed order.
#include "../operations/combine.h"
#include "device.cuh"
#include "runtime.cuh"

namespace frskd::cuda {

namespace {

constexpr int kCombineThreads = 512;

struct CombineParameters {
  const void* attention_losses;  // (L, N)
  const void* logits_losses;     // (4, R): ce_student, ce_teacher, kd, weight
  void* parts;                   // (6,): total, ce_student, ce_teacher, kd, feature, 1 / weight
  void* scalars[3];              // the total; or ce_student, ce_teacher, kd
  int scalar_count;              // 1 or 3
  int64_t attention_count;       // L * N
  int64_t samples;               // N
  int64_t rows;                  // R
  double alpha;
  double beta;
  bool attention_is_double;
  bool logits_are_double;
  bool parts_are_double;
  bool has_targets;
};

__device__ __forceinline__ double value_at(const void* data, bool is_double, int64_t index) {
  return is_double ? static_cast<const double*>(data)[index]
                   : static_cast<double>(static_cast<const float*>(data)[index]);
}

__device__ __forceinline__ void store_value(void* data, bool is_double, int64_t index, double value) {
  if (is_double) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(kCombineThreads) combine_parts(const __grid_constant__ CombineParameters parameters) {
  __shared__ static double scratch[5 * kCombineThreads / kWarpSize];
  double sums[5] = {};  // ce_student, ce_teacher, kd, weight, attention
  for (int64_t row = threadIdx.x; row < parameters.rows; row += kCombineThreads) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] += value_at(parameters.logits_losses, parameters.logits_are_double, i * parameters.rows + row);
    }
  }
  for (int64_t i = threadIdx.x; i < parameters.attention_count; i += kCombineThreads) {
    sums[4] += value_at(parameters.attention_losses, parameters.attention_is_double, i);
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
  const double parts[6] = {total, ce_student, ce_teacher, kd, feature, inverse_weight};
#pragma unroll
  for (int i = 0; i < 6; ++i) store_value(parameters.parts, parameters.parts_are_double, i, parts[i]);
  if (parameters.scalar_count == 1) {
    store_value(parameters.scalars[0], parameters.parts_are_double, 0, parts[0]);
  } else {
#pragma unroll
    for (int i = 0; i < 3; ++i) store_value(parameters.scalars[i], parameters.parts_are_double, 0, parts[i + 1]);
  }
}

bool is_double(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double, name, " has dtype ",
      torch::headeronly::toString(dtype), ", but float32 or float64 was wanted.");
  return dtype == ScalarType::Double;
}

void combine(const Combine& call) {
  const Tensor &attention_losses = call.attention_losses, &logits_losses = call.logits_losses;
  CombineParameters parameters{};
  parameters.attention_is_double = is_double(attention_losses, "attention_losses");
  parameters.logits_are_double = is_double(logits_losses, "logits_losses");
  parameters.parts_are_double = is_double(call.parts, "parts");
  STD_TORCH_CHECK(
      attention_losses.dim() == 2, "attention_losses has shape ", shape_of(attention_losses),
      ", but (L, N) was wanted.");
  STD_TORCH_CHECK(
      logits_losses.dim() == 2 && logits_losses.size(0) == 4, "logits_losses has shape ", shape_of(logits_losses),
      ", but (4, R) was wanted.");
  check_contiguous(
      attention_losses, "attention_losses", logits_losses, attention_losses.scalar_type(),
      {attention_losses.size(0), attention_losses.size(1)});
  check_contiguous(
      logits_losses, "logits_losses", logits_losses, logits_losses.scalar_type(), {4, logits_losses.size(1)});
  check_contiguous(call.parts, "parts", logits_losses, call.parts.scalar_type(), {6});
  parameters.attention_losses = attention_losses.data_ptr();
  parameters.logits_losses = logits_losses.data_ptr();
  parameters.parts = call.parts.data_ptr();
  const size_t count = call.scalars.size();
  STD_TORCH_CHECK(
      count == 1 || count == 3, "scalars has ", count,
      " tensors, but one for the total, or three for ce_student, ce_teacher and kd were wanted.");
  parameters.scalar_count = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    check_contiguous(call.scalars[i], "scalars", logits_losses, call.parts.scalar_type(), {});
    parameters.scalars[i] = call.scalars[i].data_ptr();
  }
  parameters.attention_count = attention_losses.numel();
  parameters.samples = attention_losses.size(1);
  parameters.rows = logits_losses.size(1);
  parameters.alpha = call.alpha;
  parameters.beta = call.beta;
  parameters.has_targets = call.has_targets;
  const DeviceGuard guard(logits_losses);
  launch(combine_parts, 1, kCombineThreads, 0, guard.stream(), parameters);
}

FRSKD_CUDA_OPERATION(combine)

}  // namespace

}  // namespace frskd::cuda
