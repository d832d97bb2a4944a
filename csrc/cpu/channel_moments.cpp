// Entry points of the operation `channel_moments` on the CPU.
#include "../operations/channel_moments_checks.h"
#include "channel_moments_call.h"
#include "tensors.h"
#include "threads.h"

namespace frskd {
namespace {

constexpr std::int64_t kCacheBytes = std::int64_t{1} << 25;  // what is larger is written past the cache

ChannelMoments kernel_call_of(const Tensor& x, const Tensor& other) {
  ChannelMoments call{};
  call.x = map_of(x);
  call.other = map_of(other);
  call.channels_together = !has_together(x, false) || !has_together(other, false);
  call.stream = other.numel() * static_cast<std::int64_t>(other.element_size()) >= kCacheBytes;
  call.batch = x.size(0);
  return call;
}

void channel_moments_forward(const ChannelMomentsForward& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  ChannelMoments call = kernel_call_of(arguments.x, arguments.out ? *arguments.out : arguments.x);
  if (!arguments.out) call.other.data = nullptr;
  call.epsilon = arguments.epsilon;
  call.divisor = call.x.height * call.x.width - (arguments.unbiased ? 1 : 0);
  call.mean = arguments.own_mean.data_ptr();
  call.std = arguments.own_std.data_ptr();
  call.scale = data_or_null(arguments.std);
  call.shift = data_or_null(arguments.mean);
  kernels<ChannelMomentsKernels>().forward(call, element_of(kind.dtype), run_parallel, thread_count());
}

void channel_moments_affine(const ChannelMomentsAffine& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  ChannelMoments call = kernel_call_of(arguments.x, arguments.out);
  call.mean = arguments.centre.data_ptr();
  call.scale = arguments.scale.data_ptr();
  call.shift = arguments.shift.data_ptr();
  kernels<ChannelMomentsKernels>().affine(call, element_of(kind.dtype), run_parallel, thread_count());
}

void channel_moments_sums(const ChannelMomentsSums& arguments) {
  const Kind kind = check(arguments, Device::kCpu);
  ChannelMoments call = kernel_call_of(arguments.x, arguments.grad);
  call.mean = arguments.centre.data_ptr();
  call.plain = arguments.plain.data_ptr();
  call.weighted = arguments.weighted.data_ptr();
  kernels<ChannelMomentsKernels>().sums(call, element_of(kind.dtype), run_parallel, thread_count());
}

FRSKD_CPU_OPERATION(channel_moments_forward)
FRSKD_CPU_OPERATION(channel_moments_affine)
FRSKD_CPU_OPERATION(channel_moments_sums)

}  // namespace
}  // namespace frskd
