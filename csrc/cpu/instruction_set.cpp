#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace frskd {

InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet chosen = [] {
    const char* named = std::getenv("FRSKD_FAST_CPU");
    const auto at_most = [named](const char* name) { return named != nullptr && std::strcmp(named, name) == 0; };
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!avx2 || at_most("baseline")) return InstructionSet::kBaseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return !avx512 || at_most("avx2") ? InstructionSet::kAvx2 : InstructionSet::kAvx512;
  }();
  return chosen;
#else
  return InstructionSet::kBaseline;
#endif
}

}  // namespace frskd
