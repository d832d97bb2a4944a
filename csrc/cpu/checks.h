// Checks of the C++ entry points. They trust nothing: a call straight into torch.ops with hostile arguments must end in
// a sentence.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "views.h"

namespace frskd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  const auto sizes = tensor.sizes();
  for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(sizes[axis]);
  }
  return text + ")";
}

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has a dtype that is not float32, bfloat16, float16 or float64.");
  }
}

inline ScalarType accumulate_type(Element element) {
  return element == Element::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_on_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, but the C++ kernels compute there.");
}

// A float or double working tensor: contiguous, of exactly `numel` elements.
inline void* working_tensor(const Tensor& tensor, Element element, std::int64_t numel, const char* name) {
  check_on_cpu(tensor, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == accumulate_type(element), name, " must be float64 for float64 inputs, else float32.");
  STD_TORCH_CHECK(
      tensor.numel() == numel && tensor.is_contiguous(), name, " has shape ", shape_text(tensor), ", but ", numel,
      " contiguous elements were wanted.");
  return tensor.data_ptr();
}

// (N, C, H, W), (N, C, W) or (N, C) as a Map; `same_as` gives the element type every tensor of the call must have.
inline Map map_of(const Tensor& tensor, Element element, std::int64_t least_rank, const char* name) {
  check_on_cpu(tensor, name);
  STD_TORCH_CHECK(element_of(tensor, name) == element, name, " has another dtype than the first tensor of the call.");
  const std::int64_t rank = tensor.dim();
  STD_TORCH_CHECK(
      rank >= least_rank && rank <= 4, name, " has shape ", shape_text(tensor), ", but between ", least_rank,
      " and 4 axes were wanted.");
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

inline void check_number(double value, double least, const char* name) {
  STD_TORCH_CHECK(
      std::isfinite(value) && value >= least, name, " is ", value, ", but at least ", least, " was wanted.");
}

}  // namespace frskd
