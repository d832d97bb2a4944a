// Arguments of the fusion kernels, and their table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

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
  int weighting;
  double epsilon;
  const void* weight;     // (count,)
  void* weight_gradient;  // (count,), or null
};

struct MapStatistics {
  Map input;
  std::int64_t batch;
  double epsilon;
  void* statistics;  // (3, C): mean, inverse deviation, biased variance
};

struct FusionKernels {
  void (*statistics)(const MapStatistics&, Element, ParallelFor, int threads);
  void (*forward)(const Fusion&, Element, ParallelFor, int threads);
  void (*backward)(const Fusion&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_KERNELS(FusionKernels)

}  // namespace frskd
