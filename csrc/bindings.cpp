// Schemas of the compiled operations. Outputs are allocated by the caller, so no operation needs a shape function. Only
// logits_with_gradients allocates its own, because for five small tensors Python takes a fifth as long as the kernel.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(frskd_fast_native, m) {
  m.def(
      "logits_forward(Tensor[] students, Tensor[] teachers, Tensor[] targets, Tensor[] targets_b, float mix, "
      "float label_smoothing, int ignore_index, float temperature, Tensor(a!) losses, Tensor(b!) statistics, "
      "Tensor(c!) inverse_valid) -> ()");
  m.def(
      "logits_with_gradients(Tensor student, Tensor teacher, Tensor? targets, Tensor? targets_b, float mix, "
      "float label_smoothing, int ignore_index, float temperature, bool mean, float ce_student_weight, "
      "float ce_teacher_weight, float kd_weight, bool need_teacher) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)");
  m.def(
      "logits_backward(Tensor[] grads, int grad_head_stride, int grad_row_stride, float[] scales, "
      "Tensor? inverse_valid, Tensor[] students, Tensor[] teachers, Tensor[] targets, Tensor[] targets_b, float mix, "
      "float label_smoothing, int ignore_index, float temperature, Tensor statistics, Tensor losses, "
      "bool kd_to_teacher, Tensor(a!)[] student_gradients, Tensor(b!)[] teacher_gradients) -> ()");
  m.def("fusion_statistics(Tensor[] inputs, float[] epsilons, Tensor(a!)[] statistics, Tensor(b!)? workspace) -> ()");
  m.def(
      "fusion_forward(Tensor[] inputs, Tensor[] statistics, Tensor[] gammas, Tensor[] betas, Tensor weight, "
      "int[] resamples, int pre, int act, int weighting, float epsilon, Tensor(a!) out, "
      "Tensor? depthwise=None) -> ()");
  m.def(
      "fusion_backward_sums(Tensor grad, Tensor[] inputs, Tensor[] statistics, Tensor[] gammas, Tensor[] betas, "
      "Tensor weight, int[] resamples, int pre, int act, int weighting, float epsilon, Tensor(a!)[] sums, "
      "Tensor(b!) weight_gradient, Tensor(c!)? workspace, Tensor? depthwise=None, "
      "Tensor(d!)? depthwise_gradient=None, Tensor(e!)? map_gradient=None) -> ()");
  m.def(
      "fusion_backward(Tensor grad, Tensor[] inputs, Tensor[] statistics, Tensor[] gammas, Tensor[] betas, "
      "Tensor weight, Tensor[] sums, int[] resamples, int pre, int act, int weighting, float epsilon, int[] positions, "
      "Tensor(a!)[] gradients, Tensor(b!)? weight_gradient, Tensor(c!)? workspace) -> ()");
}
