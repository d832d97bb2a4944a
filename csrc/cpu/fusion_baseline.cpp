// The fusion kernels for whatever instruction set the compiler targets by default (SSE2 on x86-64, NEON on ARM64).
#include "fusion_kernel.h"

namespace frskd {
const FusionKernels kBaselineFusionKernels = {fusion_statistics, fusion_forward, fusion_backward};
}  // namespace frskd
