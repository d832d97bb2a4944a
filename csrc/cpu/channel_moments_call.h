// Arguments of the kernels of `channel_moments`, and their table.
#pragma once

#include "instruction_set.h"
#include "views.h"

namespace frskd {

// Numbers are (N, C), in the accumulate type; what a kernel does not use is null.
struct ChannelMoments {
  Map x;
  Map other;               // what is written, or the gradient of the sums
  bool channels_together;  // in both maps, else the pixels of a channel
  bool stream;             // what is written does not fit the cache
  std::int64_t batch;
  double epsilon;
  std::int64_t divisor;  // of the variance
  void* mean;            // written, but for sums and affine maps, where it is the centre
  void* std;             // written
  const void* scale;     // of the affine map, or the standard deviation of the result
  const void* shift;     // of the affine map, or the mean of the result
  void* plain;
  void* weighted;
};

struct ChannelMomentsKernels {
  void (*forward)(const ChannelMoments&, Element, ParallelFor, int threads);
  void (*affine)(const ChannelMoments&, Element, ParallelFor, int threads);
  void (*sums)(const ChannelMoments&, Element, ParallelFor, int threads);
};
FRSKD_DECLARE_WIDE_KERNELS(ChannelMomentsKernels)

}  // namespace frskd
