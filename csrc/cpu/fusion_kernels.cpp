#include "fusion_backward.h"
#include "fusion_forward.h"
#include "fusion_statistics.h"

namespace frskd {
namespace {

void fusion_statistics(const MapStatistics& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) { map_statistics<decltype(value), decltype(sum)>(call, run); });
}

void fusion_forward(const Fusion& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) { fuse_forward<decltype(value), decltype(sum)>(call, run); });
}

void fusion_backward(const Fusion& call, Element element, ParallelFor run, int) {
  with_element(element, [&](auto value, auto sum) { fuse_backward<decltype(value), decltype(sum)>(call, run); });
}

}  // namespace

FRSKD_DEFINE_KERNELS(FusionKernels) = {fusion_statistics, fusion_forward, fusion_backward};
}  // namespace frskd
