#include "logits_kernel.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(LogitsKernels) = {logits_forward, logits_backward};
}  // namespace frskd
