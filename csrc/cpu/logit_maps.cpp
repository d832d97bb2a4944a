// Entry points of the operation `logit_maps` on the CPU.
#include "../operations/logit_maps_checks.h"
#include "logit_maps_call.h"
#include "tensors.h"
#include "threads.h"

namespace frskd {
namespace {

LogitMaps kernel_call_of(const LogitMapsInputs& inputs, const LogitMapsSettings& settings) {
  LogitMaps call{};
  call.student = map_of(inputs.student);
  call.has_teacher = inputs.teacher.has_value();
  if (call.has_teacher) call.teacher = map_of(*inputs.teacher);
  call.batch = inputs.student.size(0);
  call.height = settings.height;
  call.width = settings.width;
  if (inputs.targets.has_value()) {
    call.labels = static_cast<const std::int64_t*>(inputs.targets->data_ptr());
    std::copy_n(inputs.targets->strides().begin(), 3, call.label_strides);
  }
  call.class_weights = data_or_null(inputs.class_weights);
  call.label_smoothing = settings.label_smoothing;
  call.ignore_index = settings.ignore_index;
  call.temperature = settings.temperature;
  return call;
}

void want(LogitMaps& call, GradientMap gradient, const std::optional<Tensor>& tensor) {
  if (tensor.has_value()) call.gradients[gradient] = map_of(*tensor);
}

void run(const LogitMaps& call, const Kind& kind) {
  kernels<LogitMapsKernels>().run(call, element_of(kind.dtype), run_parallel, thread_count());
}

void logit_maps_sums(const LogitMapsSums& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  LogitMaps call = kernel_call_of(arguments.inputs, arguments.settings);
  call.sums = arguments.sums.data_ptr();
  want(call, kCeStudent, arguments.ce_student);
  want(call, kKdStudent, arguments.kd_student);
  want(call, kCeTeacher, arguments.ce_teacher);
  want(call, kKdTeacher, arguments.kd_teacher);
  run(call, kind);
}

void logit_maps_pixels(const LogitMapsPixels& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  LogitMaps call = kernel_call_of(arguments.inputs, arguments.settings);
  for (std::size_t term = 0; term < 3; ++term) call.losses[term] = arguments.losses[term].data_ptr();
  run(call, kind);
}

void logit_maps_pixels_backward(const LogitMapsPixelsBackward& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  LogitMaps call = kernel_call_of(arguments.inputs, arguments.settings);
  for (std::size_t term = 0; term < 3; ++term) call.grads[term] = arguments.grads[term].data_ptr();
  call.kd_to_teacher = arguments.kd_to_teacher;
  want(call, kCeStudent, arguments.student_gradient);
  want(call, kCeTeacher, arguments.teacher_gradient);
  run(call, kind);
}

FRSKD_CPU_OPERATION(logit_maps_sums)
FRSKD_CPU_OPERATION(logit_maps_pixels)
FRSKD_CPU_OPERATION(logit_maps_pixels_backward)

}  // namespace
}  // namespace frskd
