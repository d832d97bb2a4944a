// Entry points of the attention operation on the CPU.
#include "../operations/attention.h"

#include "attention_call.h"
#include "checks.h"
#include "threads.h"

namespace frskd {
namespace {

// Gradients above this many bytes leave the cache before anybody reads them.
constexpr std::int64_t kStreamingBytes = 16 << 20;

struct Pyramid {
  std::vector<Map> maps;
  std::int64_t batch = 0;
  std::int64_t pixels = 0;  // of one sample, over all levels
};

Pyramid pyramid_of(const std::vector<Tensor>& features, Element element, const char* name) {
  Pyramid pyramid;
  for (const Tensor& feature : features) {
    pyramid.maps.push_back(map_of(feature, element, 4, name));
    const Map& map = pyramid.maps.back();
    const std::int64_t batch = feature.sizes()[0];
    if (pyramid.maps.size() == 1) pyramid.batch = batch;
    STD_TORCH_CHECK(
        batch == pyramid.batch && map.channels > 0 && map.height > 0 && map.width > 0, name, " has a level of shape ",
        shape_text(feature), ", but the batch of the first level and at least one channel and pixel were wanted.");
    pyramid.pixels += map.height * map.width;
  }
  return pyramid;
}

void attention_forward(const AttentionForward& call) {
  check_number(call.exponent, 1.0, "exponent");
  STD_TORCH_CHECK(
      call.students.size() == call.teachers.size(), "teachers has ", call.teachers.size(), " levels, but students has ",
      call.students.size(), ".");
  if (call.students.empty()) return;
  const Element element = element_of(call.students[0], "students");
  const Pyramid student = pyramid_of(call.students, element, "students");
  const Pyramid teacher = pyramid_of(call.teachers, element, "teachers");
  STD_TORCH_CHECK(student.batch == teacher.batch, "teachers has another batch size than students.");
  for (std::size_t level = 0; level < student.maps.size(); ++level) {
    STD_TORCH_CHECK(
        student.maps[level].height == teacher.maps[level].height &&
            student.maps[level].width == teacher.maps[level].width,
        "teachers[", level, "] has shape ", shape_text(call.teachers[level]), ", but the pixels of students[", level,
        "] ", shape_text(call.students[level]), " were wanted.");
  }
  const std::int64_t levels = static_cast<std::int64_t>(call.students.size());
  const auto coefficients = [&](const std::optional<Tensor>& tensor, const char* name) -> void* {
    return tensor ? working_tensor(*tensor, element, student.batch * student.pixels, name) : nullptr;
  };
  const AttentionForwardCall kernel_call{
      student.maps.data(),
      teacher.maps.data(),
      levels,
      student.batch,
      call.exponent,
      working_tensor(call.losses, element, levels * student.batch, "losses"),
      coefficients(call.student_coefficients, "student_coefficients"),
      coefficients(call.teacher_coefficients, "teacher_coefficients")};
  kernels<AttentionKernels>().forward(kernel_call, element, run_parallel, thread_count());
}

void attention_backward(const AttentionBackward& call) {
  check_number(call.exponent, 1.0, "exponent");
  STD_TORCH_CHECK(
      call.features.size() == call.gradients.size(), "gradients has ", call.gradients.size(),
      " levels, but features has ", call.features.size(), ".");
  if (call.features.empty()) return;
  const Element element = element_of(call.features[0], "features");
  const Pyramid feature = pyramid_of(call.features, element, "features");
  const Pyramid gradient = pyramid_of(call.gradients, element, "gradients");
  const std::int64_t levels = static_cast<std::int64_t>(call.features.size());
  std::int64_t bytes = 0;
  for (std::size_t level = 0; level < call.features.size(); ++level) {
    const Map& in = feature.maps[level];
    const Map& out = gradient.maps[level];
    STD_TORCH_CHECK(
        gradient.batch == feature.batch && in.channels == out.channels && in.height == out.height &&
            in.width == out.width,
        "gradients[", level, "] has shape ", shape_text(call.gradients[level]), ", but that of features[", level, "] ",
        shape_text(call.features[level]), " was wanted.");
    bytes += call.gradients[level].numel() * (element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2);
  }
  check_on_cpu(call.grad, "grad");
  STD_TORCH_CHECK(
      call.grad.dim() == 2 && call.grad.sizes()[0] == levels && call.grad.sizes()[1] == feature.batch &&
          call.grad.scalar_type() == accumulate_type(element),
      "grad has shape ", shape_text(call.grad), ", but (levels, batch) = (", levels, ", ", feature.batch,
      ") in the accumulate dtype was wanted.");
  const AttentionBackwardCall kernel_call{
      call.grad.data_ptr(),
      call.grad.strides()[0],
      call.grad.strides()[1],
      call.scale,
      feature.maps.data(),
      gradient.maps.data(),
      working_tensor(call.coefficients, element, feature.batch * feature.pixels, "coefficients"),
      levels,
      feature.batch,
      call.exponent,
      bytes > kStreamingBytes};
  kernels<AttentionKernels>().backward(kernel_call, element, run_parallel, thread_count());
}

void attention_map(const AttentionMap& call) {
  check_number(call.exponent, 1.0, "exponent");
  const Element element = element_of(call.feature, "feature");
  const Pyramid pyramid = pyramid_of({call.feature}, element, "feature");
  const AttentionMapCall kernel_call{
      pyramid.maps[0], pyramid.batch, call.exponent,
      working_tensor(call.map, element, pyramid.batch * pyramid.pixels, "map"),
      working_tensor(call.norm, element, pyramid.batch, "norm")};
  kernels<AttentionKernels>().map(kernel_call, element, run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(attention_forward)
FRSKD_CPU_OPERATION(attention_backward)
FRSKD_CPU_OPERATION(attention_map)

}  // namespace
}  // namespace frskd
