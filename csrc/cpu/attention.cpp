// Entry points of the attention operation on the CPU.
#include "../operations/attention_checks.h"
#include "attention_call.h"
#include "tensors.h"
#include "threads.h"

namespace frskd {
namespace {

// Gradients above this many bytes leave the cache before anybody reads them.
constexpr std::int64_t kStreamingBytes = 16 << 20;

void attention_forward(const AttentionForward& call) {
  const Levels levels = check(call, Device::kCpu);
  const std::vector<Map> students = maps_of(call.students), teachers = maps_of(call.teachers);
  const AttentionForwardCall kernel_call{
      students.data(),
      teachers.data(),
      levels.count,
      levels.batch,
      call.exponent,
      call.losses.data_ptr(),
      data_or_null(call.student_coefficients),
      data_or_null(call.teacher_coefficients)};
  kernels<AttentionKernels>().forward(kernel_call, element_of(levels.kind.dtype), run_parallel, thread_count());
}

void attention_backward(const AttentionBackward& call) {
  const Levels levels = check(call, Device::kCpu);
  const std::vector<Map> features = maps_of(call.features), gradients = maps_of(call.gradients);
  std::int64_t bytes = 0;
  for (const Tensor& gradient : call.gradients) {
    bytes += gradient.numel() * static_cast<std::int64_t>(gradient.element_size());
  }
  const AttentionBackwardCall kernel_call{
      call.grad.data_ptr(), call.grad.stride(0), call.grad.stride(1),          call.scale,
      features.data(),      gradients.data(),    call.coefficients.data_ptr(), levels.count,
      levels.batch,         call.exponent,       bytes > kStreamingBytes};
  kernels<AttentionKernels>().backward(kernel_call, element_of(levels.kind.dtype), run_parallel, thread_count());
}

void attention_map(const AttentionMap& call) {
  const Element element = element_of(check(call, Device::kCpu).dtype);
  const AttentionMapCall kernel_call{
      map_of(call.feature), call.feature.size(0), call.exponent, call.map.data_ptr(), call.norm.data_ptr()};
  kernels<AttentionKernels>().map(kernel_call, element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(attention_forward)
FRSKD_CPU_OPERATION(attention_backward)
FRSKD_CPU_OPERATION(attention_map)

}  // namespace
}  // namespace frskd
