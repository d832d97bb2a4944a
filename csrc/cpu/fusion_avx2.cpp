// The fusion kernels for AVX2, FMA and F16C; the entry points choose at run time by what the processor has.
#if defined(__x86_64__)

// These must come before the instruction set changes: what they define inline may be shared with other files.
#include <cstdint>

#include "views.h"

#define FRSKD_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "fusion_kernel.h"

namespace frskd {
const FusionKernels kAvx2FusionKernels = {fusion_statistics, fusion_forward, fusion_backward};
}  // namespace frskd

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
