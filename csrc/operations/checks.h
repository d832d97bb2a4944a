// Checks of the operations' arguments, the same on every device. They trust nothing: a call straight into torch.ops
// with hostile arguments must end in a sentence.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <ostream>

#include "../operation.h"

namespace frskd {

using torch::headeronly::ScalarType;

enum class Device { kCpu, kCuda };

// An argument or an entry of one: "students[1]", which becomes text only where something is wrong.
struct Name {
  const char* argument;
  std::int64_t entry = -1;
  Name(const char* argument) : argument(argument) {}
  Name(const char* argument, std::size_t entry) : argument(argument), entry(static_cast<std::int64_t>(entry)) {}
};

inline std::ostream& operator<<(std::ostream& text, const Name& name) {
  text << name.argument;
  return name.entry < 0 ? text : text << "[" << name.entry << "]";
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const std::int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }

// What the tensors of a call share with its first one.
struct Kind {
  Device device;
  std::int32_t device_index;
  ScalarType dtype;       // of maps and logits
  ScalarType accumulate;  // of losses, statistics and other numbers
};

inline void check_device(const Tensor& tensor, const Name& name, Device device) {
  const bool cuda = device == Device::kCuda;
  const char* wanted = cuda ? ", but a CUDA tensor was wanted." : ", but a CPU tensor was wanted.";
  STD_TORCH_CHECK(tensor.defined(), name, " is an undefined tensor", wanted);
  STD_TORCH_CHECK(cuda ? tensor.is_cuda() : tensor.is_cpu(), name, " is on another device", wanted);
}

inline void check_device(const Tensor& tensor, const Name& name, const Kind& kind) {
  check_device(tensor, name, kind.device);
  STD_TORCH_CHECK(
      tensor.get_device_index() == kind.device_index, name, " is on CUDA device ", tensor.get_device_index(),
      ", but device ", kind.device_index, ", that of the first tensor, was wanted.");
}

inline Kind kind_of(const Tensor& first, const Name& name, Device device) {
  check_device(first, name, device);
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      name, " has dtype ", torch::headeronly::toString(dtype), ", but Float, BFloat16, Half or Double was wanted.");
  return {
      device, first.get_device_index(), dtype, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float};
}

inline void check_dtype(const Tensor& tensor, const Name& name, ScalarType wanted) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == wanted, name, " has dtype ", torch::headeronly::toString(dtype), ", but ",
      torch::headeronly::toString(wanted), " was wanted.");
}

template <typename Sizes>
void check_shape(const Tensor& tensor, const Name& name, const Sizes& wanted) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()), name, " has shape ", shape_text(sizes),
      ", but ", shape_text(wanted), " was wanted.");
}

// Losses, statistics, weights: contiguous, of the accumulate dtype.
inline void check_numbers(
    const Tensor& tensor, const Name& name, const Kind& kind, std::initializer_list<std::int64_t> shape) {
  check_device(tensor, name, kind);
  check_dtype(tensor, name, kind.accumulate);
  check_shape(tensor, name, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous, but a contiguous tensor was wanted.");
}

// A tensor of any strides with the shape of `like`.
inline void check_like(const Tensor& tensor, const Name& name, const Kind& kind, ScalarType dtype, const Tensor& like) {
  check_device(tensor, name, kind);
  check_dtype(tensor, name, dtype);
  check_shape(tensor, name, like.sizes());
}

// A map (N, C, H, W) of any strides.
inline void check_map(const Tensor& map, const Name& name, const Kind& kind) {
  check_device(map, name, kind);
  check_dtype(map, name, kind.dtype);
  STD_TORCH_CHECK(map.dim() == 4, name, " has shape ", shape_text(map), ", but (N, C, H, W) was wanted.");
  const std::int64_t channels = map.size(1), height = map.size(2), width = map.size(3);
  STD_TORCH_CHECK(
      channels > 0 && height > 0 && width > 0, name, " has shape ", shape_text(map),
      ", but at least one channel and one pixel were wanted.");
  constexpr std::int64_t kLimit = std::int64_t{1} << 30;
  STD_TORCH_CHECK(
      kind.device == Device::kCpu ||
          (channels <= kLimit && height <= kLimit && width <= kLimit && height * width <= kLimit),
      name, " has shape ", shape_text(map), ", but at most 2^30 channels and 2^30 pixels were wanted.");
}

inline void check_count(std::size_t count, const Name& name, std::size_t wanted) {
  STD_TORCH_CHECK(count == wanted, name, " has ", count, " entries, but ", wanted, " were wanted.");
}

template <typename Number>
void check_between(Number value, const Name& name, Number least, Number most) {
  STD_TORCH_CHECK(
      value >= least && value <= most, name, " is ", value, ", but a number from ", least, " to ", most,
      " was wanted.");
}

inline void check_at_least(double value, const Name& name, double least) {
  STD_TORCH_CHECK(
      std::isfinite(value) && value >= least, name, " is ", value, ", but a finite number of at least ", least,
      " was wanted.");
}

}  // namespace frskd
