// The kernels for whatever instruction set the compiler targets by default (SSE2 on x86-64, NEON on ARM64).
#include "attention_kernel.h"
#include "logits_kernel.h"

namespace frskd {
const Kernels kBaselineKernels = {
    attention_forward, attention_backward, attention_map, logits_forward, logits_backward};
}  // namespace frskd
