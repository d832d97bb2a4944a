// Arguments of the kernel of `logit_maps`, and its table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

// Gradient maps. Where the losses are reduced there is one for each term; where every pixel has an upstream gradient of
// its own, the first is the student's and the third the teacher's.
constexpr int kGradientMaps = 4;
enum GradientMap { kCeStudent, kKdStudent, kCeTeacher, kKdTeacher };

struct LogitMaps {
  Map student;  // (N, K, h, w)
  Map teacher;
  bool has_teacher;
  std::int64_t batch;
  std::int64_t height;         // H
  std::int64_t width;          // W
  const std::int64_t* labels;  // (N, H, W), or null
  std::int64_t label_strides[3];
  const void* class_weights;  // (K,), or null
  double label_smoothing;
  std::int64_t ignore_index;
  double temperature;
  void* sums;                    // (4,), or null
  void* losses[3];               // (N, H, W), or null
  const void* grads[3];          // (N, H, W), or null
  bool kd_to_teacher;            // with `grads`
  Map gradients[kGradientMaps];  // data is null where none is wanted
};

struct LogitMapsKernels {
  void (*run)(const LogitMaps&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_WIDE_KERNELS(LogitMapsKernels)

}  // namespace frskd
