#include "attention_backward.h"
#include "attention_forward.h"

namespace frskd {
FRSKD_DEFINE_KERNELS(AttentionKernels) = {attention_forward, attention_backward, attention_map};
}  // namespace frskd
