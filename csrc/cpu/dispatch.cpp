// Chooses the kernels by what the processor has, once, and lends them PyTorch's threads.
#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace frskd {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  const char* forced = std::getenv("FRSKD_FAST_CPU");
  const bool baseline = forced != nullptr && std::strcmp(forced, "baseline") == 0;
  return !baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

const Kernels& chosen_kernels() {
#if defined(__x86_64__)
  if (has_avx2()) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

const FusionKernels& chosen_fusion_kernels() {
#if defined(__x86_64__)
  if (has_avx2()) return kAvx2FusionKernels;
#endif
  return kBaselineFusionKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = chosen_kernels();
  return chosen;
}

const FusionKernels& fusion_kernels() {
  static const FusionKernels& chosen = chosen_fusion_kernels();
  return chosen;
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  if (count <= 0) return;
  if (count <= grain) {
    body(0, count, context);
    return;
  }
  torch::stable::parallel_for(
      0, count, grain, [body, context](std::int64_t begin, std::int64_t end) { body(begin, end, context); });
}

}  // namespace frskd
