// One feature map (N, C, H, W) of any strides as the kernels see it, and the order in which they walk it.
#pragma once

#include <cstdint>

#include "../common/config.h"

namespace frskd::cuda {

// Which axis neighbouring threads follow, and how many elements one access takes.
enum class Walk : int {
  kPixels,          // along pixels, one element at a time: any strides
  kPixelPacks,      // along pixels, 16 bytes at a time (NCHW)
  kPixelHalfPacks,  // along pixels, 8 bytes at a time: 16-bit types where 8 elements do not divide the pixels
  kChannels,        // along channels, one element at a time
  kChannelPacks,    // along channels, 16 bytes at a time (channels_last)
};

struct FeatureView {
  const void* data;
  int64_t stride_sample;  // strides in elements; 0 for an axis of one entry
  int64_t stride_channel;
  int64_t stride_row;
  int64_t stride_column;
  int channels;
  int height;  // 1 where all pixels lie at one stride, then width counts them all
  int width;
  int pixels;
  Walk walk;
};

// Elements from the sample's and channel's start to a pixel.
FRSKD_HOST_DEVICE int64_t pixel_offset(const FeatureView& view, int pixel) {
  if (view.height == 1) return pixel * view.stride_column;
  return (pixel / view.width) * view.stride_row + (pixel % view.width) * view.stride_column;
}

// Fills everything but `walk`, and folds rows and columns into one axis where the strides allow it.
inline FeatureView make_feature_view(
    const void* data,
    const int64_t (&shape)[4],  // N, C, H, W
    const int64_t (&strides)[4]) {
  FeatureView view{};
  view.data = data;
  view.channels = static_cast<int>(shape[1]);
  view.pixels = static_cast<int>(shape[2] * shape[3]);
  view.stride_sample = shape[0] == 1 ? 0 : strides[0];
  view.stride_channel = shape[1] == 1 ? 0 : strides[1];
  int64_t height = shape[2], width = shape[3], stride_row = strides[2], stride_column = strides[3];
  if (width == 1) {
    width = height;
    height = 1;
    stride_column = stride_row;
  }
  if (width == 1) stride_column = 1;
  if (height == 1 || stride_row == width * stride_column) {
    width = view.pixels;
    height = 1;
    stride_row = 0;
  }
  view.height = static_cast<int>(height);
  view.width = static_cast<int>(width);
  view.stride_row = stride_row;
  view.stride_column = stride_column;
  return view;
}

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline bool allows_pixel_packs(const FeatureView& view, int count, int element_size) {
  return view.stride_column == 1 && view.width % count == 0 && view.stride_row % count == 0 &&
         view.stride_channel % count == 0 && view.stride_sample % count == 0 &&
         is_aligned(view.data, static_cast<int64_t>(count) * element_size);
}

inline bool prefers_channels(const FeatureView& view) {
  return view.pixels > 1 && view.channels > 1 && view.stride_channel == 1;
}

inline bool allows_channel_packs(const FeatureView& view, int count, int element_size) {
  return view.stride_channel == 1 && view.channels % count == 0 && view.stride_row % count == 0 &&
         view.stride_column % count == 0 && view.stride_sample % count == 0 &&
         is_aligned(view.data, static_cast<int64_t>(count) * element_size);
}

inline Walk choose_walk(const FeatureView& view, int element_size) {
  const int pack = 16 / element_size;
  if (allows_pixel_packs(view, pack, element_size)) return Walk::kPixelPacks;
  if (prefers_channels(view)) {
    return allows_channel_packs(view, pack, element_size) ? Walk::kChannelPacks : Walk::kChannels;
  }
  if (element_size == 2 && allows_pixel_packs(view, pack / 2, element_size)) return Walk::kPixelHalfPacks;
  return Walk::kPixels;
}

// The same direction, one element at a time.
inline Walk without_packs(Walk walk) {
  return walk == Walk::kChannelPacks || walk == Walk::kChannels ? Walk::kChannels : Walk::kPixels;
}

// For a kernel that walks two maps of one shape together: the wider walk that both allow.
inline Walk choose_common_walk(const FeatureView& first, const FeatureView& second, int element_size) {
  const Walk walk = choose_walk(first, element_size);
  return choose_walk(second, element_size) == walk ? walk : without_packs(walk);
}

FRSKD_HOST_DEVICE int walk_pack(Walk walk, int element_size) {
  const bool wide = walk == Walk::kPixelPacks || walk == Walk::kChannelPacks;
  return wide ? 16 / element_size : walk == Walk::kPixelHalfPacks ? 4 : 1;
}

}  // namespace frskd::cuda
