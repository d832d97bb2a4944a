// Kernels are compiled once for each instruction set; the processor decides at run time which of them are called.
//
// <op>_call.h declares a table of an operation's kernels, which plain structs are passed to:
//   struct FusionKernels { void (*forward)(const Fusion&, Element, ParallelFor, int threads); };
//   FRSKD_DECLARE_KERNELS(FusionKernels)
// <op>_kernels.cpp, which the build compiles once for each instruction set, defines it:
//   FRSKD_DEFINE_KERNELS(FusionKernels) = {fusion_forward};
// and entry points call kernels<FusionKernels>().forward(...). An operation whose kernels take long to compile has
// several such files, each with a table of its own.
//
// What <op>_kernels.cpp includes is in unnamed namespaces, and of the standard library it uses <cstdint> alone: an
// inline function compiled for AVX2 could otherwise become the library's only copy.
//
// AVX-512 serves only the kernels that gain by it, because each further one lengthens the build: an operation whose
// <op>_call.h says FRSKD_DECLARE_WIDE_KERNELS instead. setup.py looks for this word.
#pragma once

namespace frskd {

template <typename Kernels>
struct Baseline {  // whatever the compiler targets by default: SSE2 on x86-64, NEON on ARM64
  static const Kernels kTable;
};

template <typename Kernels>
struct Avx2 {  // AVX2, FMA and F16C
  static const Kernels kTable;
};

template <typename Kernels>
struct Avx512 {  // AVX-512 F, BW, DQ and VL, and what Avx2 has
  static constexpr bool kExists = false;
};

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best one of this processor, or that which the environment variable FRSKD_FAST_CPU names.
InstructionSet instruction_set();

template <typename Kernels>
const Kernels& kernels() {
#if defined(__x86_64__)
  const InstructionSet chosen = instruction_set();
  if constexpr (Avx512<Kernels>::kExists) {
    if (chosen == InstructionSet::kAvx512) return Avx512<Kernels>::kTable;
  }
  if (chosen != InstructionSet::kBaseline) return Avx2<Kernels>::kTable;
#endif
  return Baseline<Kernels>::kTable;
}

#define FRSKD_DECLARE_KERNELS(Kernels)     \
  template <>                              \
  const Kernels Baseline<Kernels>::kTable; \
  template <>                              \
  const Kernels Avx2<Kernels>::kTable;

#define FRSKD_DECLARE_WIDE_KERNELS(Kernels) \
  FRSKD_DECLARE_KERNELS(Kernels)            \
  template <>                               \
  struct Avx512<Kernels> {                  \
    static constexpr bool kExists = true;   \
    static const Kernels kTable;            \
  };

#if defined(FRSKD_AVX512)
#define FRSKD_DEFINE_KERNELS(Kernels) const Kernels Avx512<Kernels>::kTable
#elif defined(FRSKD_AVX2)
#define FRSKD_DEFINE_KERNELS(Kernels) \
  template <>                         \
  const Kernels Avx2<Kernels>::kTable
#else
#define FRSKD_DEFINE_KERNELS(Kernels) \
  template <>                         \
  const Kernels Baseline<Kernels>::kTable
#endif

}  // namespace frskd
