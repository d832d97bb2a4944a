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

bool has_avx2();

template <typename Kernels>
const Kernels& kernels() {
#if defined(__x86_64__)
  if (has_avx2()) return Avx2<Kernels>::kTable;
#endif
  return Baseline<Kernels>::kTable;
}

#define FRSKD_DECLARE_KERNELS(Kernels)     \
  template <>                              \
  const Kernels Baseline<Kernels>::kTable; \
  template <>                              \
  const Kernels Avx2<Kernels>::kTable;

#if defined(FRSKD_AVX2)
#define FRSKD_DEFINE_KERNELS(Kernels) \
  template <>                         \
  const Kernels Avx2<Kernels>::kTable
#else
#define FRSKD_DEFINE_KERNELS(Kernels) \
  template <>                         \
  const Kernels Baseline<Kernels>::kTable
#endif

}  // namespace frskd
