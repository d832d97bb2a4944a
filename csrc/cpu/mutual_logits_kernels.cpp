#include "mutual_logits_kernel.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(MutualLogitsKernels) = {mutual_logits_forward};
}  // namespace frskd
