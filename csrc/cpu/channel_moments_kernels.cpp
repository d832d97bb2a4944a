#include "channel_moments_kernel.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(ChannelMomentsKernels) = {moments_forward, moments_affine, moments_sums};
}  // namespace frskd
