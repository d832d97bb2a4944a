// Arguments of the attention kernels, and their table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

struct AttentionForwardCall {
  const Map* students;
  const Map* teachers;
  std::int64_t levels;
  std::int64_t batch;
  double exponent;
  void* losses;                // (levels, batch)
  void* student_coefficients;  // level blocks of (batch, H * W), or null
  void* teacher_coefficients;
};

struct AttentionBackwardCall {
  const void* grad;  // (levels, batch)
  std::int64_t grad_stride_level;
  std::int64_t grad_stride_sample;
  double scale;
  const Map* features;
  const Map* gradients;
  const void* coefficients;  // level blocks of (batch, H * W)
  std::int64_t levels;
  std::int64_t batch;
  double exponent;
  bool stream;  // the gradients together do not fit the cache
};

struct AttentionMapCall {
  Map feature;
  std::int64_t batch;
  double exponent;
  void* map;   // (batch, H * W)
  void* norm;  // (batch,)
};

struct AttentionKernels {
  void (*forward)(const AttentionForwardCall&, Element, ParallelFor, int threads);
  void (*backward)(const AttentionBackwardCall&, Element, ParallelFor, int threads);
  void (*map)(const AttentionMapCall&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_KERNELS(AttentionKernels)

}  // namespace frskd
