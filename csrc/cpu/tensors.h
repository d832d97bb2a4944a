// Checked tensors as the kernels take them.
#pragma once

#include "../operations/checks.h"
#include "views.h"

namespace frskd {

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      return Element::kFloat32;
  }
}

// (N, C, H, W), (N, C, W) or (N, C).
inline Map map_of(const Tensor& tensor) {
  const std::int64_t rank = tensor.dim();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  Map map{tensor.data_ptr(), sizes[1], 1, 1, strides[0], strides[1], 0, 0};
  if (rank >= 3) {
    map.width = sizes[rank - 1];
    map.stride_w = strides[rank - 1];
  }
  if (rank == 4) {
    map.height = sizes[2];
    map.stride_h = strides[2];
  }
  return map;
}

inline std::vector<Map> maps_of(const std::vector<Tensor>& tensors) {
  std::vector<Map> maps;
  for (const Tensor& tensor : tensors) maps.push_back(map_of(tensor));
  return maps;
}

// Null where there is no tensor, or an empty one.
inline void* data_or_null(const Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.data_ptr(); }
inline void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

}  // namespace frskd
