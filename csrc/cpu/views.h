// Plain descriptions of tensors, passed from the entry points (which check them) to the kernels (which trust them).
#pragma once

#include <cstdint>

namespace frskd {

enum class Element { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A feature map or class logits: (N, C, H, W) with strides in elements; missing trailing axes have size 1.
struct Map {
  void* data;
  std::int64_t channels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t stride_n;
  std::int64_t stride_c;
  std::int64_t stride_h;
  std::int64_t stride_w;
};

// Numbers of the accumulate type; or, where `packed` is not 0, that many float32 ones in three bytes each: all their
// upper halves, then all their third bytes.
struct Coefficients {
  void* data;  // level blocks of (batch, H * W), or null
  std::int64_t packed;
};

struct AttentionForward {
  const Map* students;
  const Map* teachers;
  std::int64_t levels;
  std::int64_t batch;
  double exponent;
  void* losses;  // (levels, batch)
  Coefficients student_coefficients;
  Coefficients teacher_coefficients;
};

struct AttentionBackward {
  const void* grad;  // (levels, batch)
  std::int64_t grad_stride_level;
  std::int64_t grad_stride_sample;
  double scale;
  const Map* features;
  const Map* gradients;
  Coefficients coefficients;
  std::int64_t levels;
  std::int64_t batch;
  double exponent;
  bool stream;  // the gradients together do not fit the cache
};

struct AttentionMap {
  Map feature;
  std::int64_t batch;
  double exponent;
  void* map;   // (batch, H * W)
  void* norm;  // (batch,)
};

// One head of class logits. Absent tensors have a null data pointer.
struct Head {
  Map student;
  Map teacher;
  Map probabilities;           // accumulate dtype
  const std::int64_t* labels;  // (N, H, W)
  const std::int64_t* labels_b;
  std::int64_t label_strides[3];
  std::int64_t label_b_strides[3];
  Map student_gradient;
  Map teacher_gradient;
  std::int64_t batch;
  std::int64_t first_row;  // of this head among all rows
  double scales[3];        // ce_student, ce_teacher, kd
};

struct Logits {
  const Head* heads;
  std::int64_t count;
  std::int64_t rows;  // of all heads
  double mix;
  double label_smoothing;
  std::int64_t ignore_index;
  double temperature;
  void* losses;         // (4, rows)
  void* statistics;     // (6, rows)
  void* inverse_valid;  // (count,): written forward; read backward, or null
  const void* grads[3];
  std::int64_t grad_strides[3];  // 0 where one number serves all
  std::int64_t grad_head_stride;
  std::int64_t grad_row_stride;
  bool kd_to_teacher;
  bool has_teacher;  // told apart from the data pointers, which are null where a head has no rows
  bool has_targets;
  bool has_probabilities;
};

// One input of a weighted fusion. Absent parts are null.
struct FusionInput {
  Map map;
  Map gradient;
  int resample;
  const void* statistics;  // (>= 2, C): mean, inverse deviation
  const void* gamma;       // (C,)
  const void* beta;
  const void* sums;  // (2, C) of the first backward pass, read by the second
  void* sums_out;    // the same, written by the first
};

struct Fusion {
  FusionInput inputs[4];
  int count;
  std::int64_t batch;
  Map out;  // backward: the upstream gradient
  int pre;
  int act;
  int weighting;
  double epsilon;
  const void* weight;     // (count,)
  void* weight_gradient;  // (count,), or null
  // A depthwise 3x3 convolution (C, 9) of the fused map, in which case `out` is its result; or null.
  const void* depthwise;
  void* depthwise_gradient;  // (C, 9), backward
  Map map_gradient;          // of the fused map, backward
};

struct FusionStatistics {
  Map input;
  std::int64_t batch;
  double epsilon;
  void* statistics;  // (3, C): mean, inverse deviation, biased variance
};

// Runs body(begin, end) over [0, count) on the threads PyTorch was told to use.
using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t count, std::int64_t grain, ParallelBody body, void* context);

// One set of kernels; each instruction set compiles the same source into its own table.
struct Kernels {
  void (*attention_forward)(const AttentionForward&, Element, ParallelFor, int threads);
  void (*attention_backward)(const AttentionBackward&, Element, ParallelFor, int threads);
  void (*attention_map)(const AttentionMap&, Element, ParallelFor, int threads);
  void (*logits_forward)(const Logits&, Element, ParallelFor, int threads);
  void (*logits_backward)(const Logits&, Element, ParallelFor, int threads);
};

// Those of the weighted fusion: a table and files of their own, which compile beside the others.
struct FusionKernels {
  void (*statistics)(const FusionStatistics&, Element, ParallelFor, int threads);
  void (*forward)(const Fusion&, Element, ParallelFor, int threads);
  void (*backward)(const Fusion&, Element, ParallelFor, int threads);
};

extern const Kernels kBaselineKernels;
extern const FusionKernels kBaselineFusionKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const FusionKernels kAvx2FusionKernels;
#endif

}  // namespace frskd
