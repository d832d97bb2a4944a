// Checks of the operation `channel_moments`.
#pragma once

#include "channel_moments.h"
#include "checks.h"

namespace frskd {

// The layout of a map, by which the kernels run: the pixels of a channel lie together, or the channels of a pixel do
// and pixels follow each other at one distance.
inline bool has_together(const Tensor& map, bool channels) {
  const auto strides = map.strides();
  const std::int64_t height = map.size(2), width = map.size(3);
  if (!channels) return (strides[3] == 1 || width == 1) && (strides[2] == width || height == 1);
  const bool even = height == 1 || width == 1 || strides[2] == width * strides[3];
  return even && (strides[1] == 1 || map.size(1) == 1);
}

inline Kind check_channel_maps(
    const Tensor& first, const Name& first_name, const Tensor* second, const Name& second_name, Device device) {
  const Kind kind = kind_of(first, first_name, device);
  check_map(first, first_name, kind);
  if (second != nullptr) check_like(*second, second_name, kind, kind.dtype, first);
  const auto alike = [&](bool channels) {
    return has_together(first, channels) && (second == nullptr || has_together(*second, channels));
  };
  STD_TORCH_CHECK(
      first.numel() == 0 || alike(false) || alike(true), first_name,
      " has neither the pixels of a channel together nor the channels of a pixel",
      second == nullptr ? "" : ", or another map of the call has not the same", ", but one of both was wanted.");
  return kind;
}

inline void check_channels(const Tensor& tensor, const Name& name, const Kind& kind, const Tensor& map) {
  check_numbers(tensor, name, kind, {map.size(0), map.size(1)});
}

inline Kind check(const ChannelMomentsForward& call, Device device) {
  const Kind kind = check_channel_maps(call.x, "x", call.out ? &*call.out : nullptr, "out", device);
  STD_TORCH_CHECK(
      call.mean.has_value() == call.out.has_value() && call.std.has_value() == call.out.has_value(),
      "mean, std and out are not all given or all absent, as was wanted.");
  if (call.out) check_channels(*call.mean, "mean", kind, call.x);
  if (call.out) check_channels(*call.std, "std", kind, call.x);
  check_at_least(call.epsilon, "epsilon", 0.0);
  check_channels(call.own_mean, "own_mean", kind, call.x);
  check_channels(call.own_std, "own_std", kind, call.x);
  return kind;
}

inline Kind check(const ChannelMomentsAffine& call, Device device) {
  const Kind kind = check_channel_maps(call.x, "x", &call.out, "out", device);
  check_channels(call.centre, "centre", kind, call.x);
  check_channels(call.scale, "scale", kind, call.x);
  check_channels(call.shift, "shift", kind, call.x);
  return kind;
}

inline Kind check(const ChannelMomentsSums& call, Device device) {
  const Kind kind = check_channel_maps(call.grad, "grad", &call.x, "x", device);
  check_channels(call.centre, "centre", kind, call.x);
  check_channels(call.plain, "plain", kind, call.x);
  check_channels(call.weighted, "weighted", kind, call.x);
  return kind;
}

}  // namespace frskd
