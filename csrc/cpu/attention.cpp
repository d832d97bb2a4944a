// Entry points of the attention operation on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>

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

void attention_forward(
    std::vector<Tensor> students,
    std::vector<Tensor> teachers,
    double exponent,
    Tensor losses,
    std::optional<Tensor> student_coefficients,
    std::optional<Tensor> teacher_coefficients,
    std::optional<Tensor>) {
  check_number(exponent, 1.0, "exponent");
  STD_TORCH_CHECK(
      students.size() == teachers.size(), "teachers has ", teachers.size(), " levels, but students has ",
      students.size(), ".");
  if (students.empty()) return;
  const Element element = element_of(students[0], "students");
  const Pyramid student = pyramid_of(students, element, "students");
  const Pyramid teacher = pyramid_of(teachers, element, "teachers");
  STD_TORCH_CHECK(student.batch == teacher.batch, "teachers has another batch size than students.");
  for (std::size_t level = 0; level < student.maps.size(); ++level) {
    STD_TORCH_CHECK(
        student.maps[level].height == teacher.maps[level].height &&
            student.maps[level].width == teacher.maps[level].width,
        "teachers[", level, "] has shape ", shape_text(teachers[level]), ", but the pixels of students[", level, "] ",
        shape_text(students[level]), " were wanted.");
  }
  const std::int64_t levels = static_cast<std::int64_t>(students.size());
  const std::int64_t numel = student.batch * student.pixels;
  AttentionForward call{
      student.maps.data(), teacher.maps.data(), levels, student.batch, exponent, nullptr, nullptr, nullptr};
  call.losses = working_tensor(losses, element, levels * student.batch, "losses");
  if (student_coefficients) {
    call.student_coefficients = working_tensor(*student_coefficients, element, numel, "student_coefficients");
  }
  if (teacher_coefficients) {
    call.teacher_coefficients = working_tensor(*teacher_coefficients, element, numel, "teacher_coefficients");
  }
  kernels<AttentionKernels>().forward(call, element, run_parallel, thread_count());
}

void attention_backward(
    Tensor grad,
    double scale,
    std::vector<Tensor> features,
    Tensor coefficients,
    double exponent,
    std::vector<Tensor> gradients) {
  check_number(exponent, 1.0, "exponent");
  STD_TORCH_CHECK(
      features.size() == gradients.size(), "gradients has ", gradients.size(), " levels, but features has ",
      features.size(), ".");
  if (features.empty()) return;
  const Element element = element_of(features[0], "features");
  const Pyramid feature = pyramid_of(features, element, "features");
  const Pyramid gradient = pyramid_of(gradients, element, "gradients");
  const std::int64_t levels = static_cast<std::int64_t>(features.size());
  std::int64_t bytes = 0;
  for (std::size_t level = 0; level < features.size(); ++level) {
    const Map& in = feature.maps[level];
    const Map& out = gradient.maps[level];
    STD_TORCH_CHECK(
        gradient.batch == feature.batch && in.channels == out.channels && in.height == out.height &&
            in.width == out.width,
        "gradients[", level, "] has shape ", shape_text(gradients[level]), ", but that of features[", level, "] ",
        shape_text(features[level]), " was wanted.");
    bytes += gradients[level].numel() * (element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2);
  }
  check_on_cpu(grad, "grad");
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.sizes()[0] == levels && grad.sizes()[1] == feature.batch &&
          grad.scalar_type() == accumulate_type(element),
      "grad has shape ", shape_text(grad), ", but (levels, batch) = (", levels, ", ", feature.batch,
      ") in the accumulate dtype was wanted.");
  AttentionBackward call{
      grad.data_ptr(),
      grad.strides()[0],
      grad.strides()[1],
      scale,
      feature.maps.data(),
      gradient.maps.data(),
      working_tensor(coefficients, element, feature.batch * feature.pixels, "coefficients"),
      levels,
      feature.batch,
      exponent,
      bytes > kStreamingBytes};
  kernels<AttentionKernels>().backward(call, element, run_parallel, thread_count());
}

void attention_map(Tensor feature, double exponent, Tensor map, Tensor norm) {
  check_number(exponent, 1.0, "exponent");
  const Element element = element_of(feature, "feature");
  const Pyramid pyramid = pyramid_of({feature}, element, "feature");
  const AttentionMap call{
      pyramid.maps[0], pyramid.batch, exponent, working_tensor(map, element, pyramid.batch * pyramid.pixels, "map"),
      working_tensor(norm, element, pyramid.batch, "norm")};
  kernels<AttentionKernels>().map(call, element, run_parallel, thread_count());
}

}  // namespace
}  // namespace frskd

STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&frskd::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&frskd::attention_backward));
  m.impl("attention_map", TORCH_BOX(&frskd::attention_map));
}
