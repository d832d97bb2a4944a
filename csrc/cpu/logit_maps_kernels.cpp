#include "logit_maps_kernel.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(LogitMapsKernels) = {logit_maps};
}  // namespace frskd
