#include "fusion_kernel.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(FusionKernels) = {fusion_statistics, fusion_forward, fusion_backward};
}  // namespace frskd
