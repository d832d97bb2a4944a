// The CUDA implementations of the operations whose schemas are in ../bindings.cpp. All write into the tensors they are
// given, on the current stream of the tensors' device, without a host synchronisation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace frskd::cuda {

using torch::stable::Tensor;

void logits_forward(
    const std::vector<Tensor>& students,   // heads x (N, K[, H[, W]])
    const std::vector<Tensor>& teachers,   // the same, or empty
    const std::vector<Tensor>& targets,    // heads x (N[, H[, W]]) int64, or probabilities like the logits, or empty
    const std::vector<Tensor>& targets_b,  // second labels, or empty
    double mix,
    double label_smoothing,
    int64_t ignore_index,
    double temperature,
    const Tensor& losses,        // (4, R)
    const Tensor& statistics,    // (6, R)
    const Tensor& inverse_valid  // (heads,)
);

void logits_backward(
    const std::vector<Tensor>& grads,  // 3 x 1-D: ce_student, ce_teacher, kd
    int64_t grad_head_stride,
    int64_t grad_row_stride,
    const std::vector<double>& scales,           // (3 * heads,)
    const std::optional<Tensor>& inverse_valid,  // (heads,)
    const std::vector<Tensor>& students,
    const std::vector<Tensor>& teachers,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& targets_b,
    double mix,
    double label_smoothing,
    int64_t ignore_index,
    double temperature,
    const Tensor& statistics,  // (6, R)
    const Tensor& losses,      // (4, R)
    bool kd_to_teacher,
    const std::vector<Tensor>& student_gradients,  // as students, or empty
    const std::vector<Tensor>& teacher_gradients   // as teachers, or empty
);

void fusion_statistics(
    const std::vector<Tensor>& inputs,      // K x (N, C, H_i, W_i)
    const std::vector<double>& epsilons,    // (K,)
    const std::vector<Tensor>& statistics,  // K x (3, C)
    const std::optional<Tensor>& workspace  // as frskd_fast/native/fusion.py sizes it
);

void fusion_forward(
    const std::vector<Tensor>& inputs,      // K x (N, C, H_i, W_i)
    const std::vector<Tensor>& statistics,  // K x (>= 2, C), or empty
    const std::vector<Tensor>& gammas,      // K x (C,), or empty
    const std::vector<Tensor>& betas,       // K x (C,), or empty
    const Tensor& weight,                   // (K,)
    const std::vector<int64_t>& resamples,  // (K,)
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const Tensor& out,                                     // (N, C, H, W)
    const std::optional<Tensor>& depthwise = std::nullopt  // must be absent: the CPU kernels' alone
);

void fusion_backward_sums(
    const Tensor& grad,                     // (N, C, H, W), any strides
    const std::vector<Tensor>& inputs,      // K x (N, C, H_i, W_i)
    const std::vector<Tensor>& statistics,  // K x (>= 2, C), or empty
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,  // (K,)
    const std::vector<int64_t>& resamples,
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const std::vector<Tensor>& sums,  // K x (2, C), or empty as the statistics
    const Tensor& weight_gradient,    // (K,)
    const std::optional<Tensor>& workspace,
    const std::optional<Tensor>& depthwise = std::nullopt,
    const std::optional<Tensor>& depthwise_gradient = std::nullopt,
    const std::optional<Tensor>& map_gradient = std::nullopt);

void fusion_backward(
    const Tensor& grad,                     // (N, C, H, W), any strides
    const std::vector<Tensor>& inputs,      // K x (N, C, H_i, W_i)
    const std::vector<Tensor>& statistics,  // K x (>= 2, C), or empty
    const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas,
    const Tensor& weight,             // (K,)
    const std::vector<Tensor>& sums,  // K x (2, C), or empty
    const std::vector<int64_t>& resamples,
    int64_t pre,
    int64_t act,
    int64_t weighting,
    double epsilon,
    const std::vector<int64_t>& positions,         // of the inputs that need a gradient, rising
    const std::vector<Tensor>& gradients,          // as those inputs
    const std::optional<Tensor>& weight_gradient,  // (K,)
    const std::optional<Tensor>& workspace);

}  // namespace frskd::cuda
