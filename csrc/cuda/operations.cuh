// The CUDA implementations of the operations whose schemas are in ../bindings.cpp. All write into the tensors they are
// given, on the current stream of the tensors' device, without a host synchronisation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace frskd::cuda {

using torch::stable::Tensor;

void attention_forward(
    const std::vector<Tensor>& students,  // L x (N, C_l, H_l, W_l)
    const std::vector<Tensor>& teachers,  // L x (N, D_l, H_l, W_l)
    double exponent,
    const Tensor& losses,                               // (L, N)
    const std::optional<Tensor>& student_coefficients,  // (N * sum_l H_l * W_l,)
    const std::optional<Tensor>& teacher_coefficients,  // (N * sum_l H_l * W_l,)
    const std::optional<Tensor>& workspace              // (2 * N * sum_l H_l * W_l,)
);

void attention_backward(
    const Tensor& grad,  // (L, N), any strides
    double scale,
    const std::vector<Tensor>& features,  // L x (N, C_l, H_l, W_l)
    const Tensor& coefficients,           // (N * sum_l H_l * W_l,)
    double exponent,
    const std::vector<Tensor>& gradients  // as features
);

void attention_map(
    const Tensor& feature,  // (N, C, H, W)
    double exponent,
    const Tensor& map,  // (N, H * W)
    const Tensor& norm  // (N,)
);

}  // namespace frskd::cuda
