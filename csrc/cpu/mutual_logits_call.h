// Arguments of the kernel of `mutual_logits`, and its table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

struct MutualLogits {
  const Map* logits;  // heads x (N, K)
  std::int64_t heads;
  std::int64_t batch;
  std::int64_t classes;
  const std::int64_t* labels;  // (N,), or null
  std::int64_t label_stride;
  std::int64_t ignore_index;
  double temperature;
  double offset;
  double weight;
  double inverse_valid;  // 1 / rows that have a label, 0 where none has
  void* rows;            // (2, heads, N)
  void* gradients;       // (heads, N, K)
};

struct MutualLogitsKernels {
  void (*forward)(const MutualLogits&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_WIDE_KERNELS(MutualLogitsKernels)

}  // namespace frskd
