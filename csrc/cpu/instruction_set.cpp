#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace frskd {

bool has_avx2() {
#if defined(__x86_64__)
  static const bool chosen = [] {
    const char* forced = std::getenv("FRSKD_FAST_CPU");
    const bool baseline = forced != nullptr && std::strcmp(forced, "baseline") == 0;
    return !baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }();
  return chosen;
#else
  return false;
#endif
}

}  // namespace frskd
