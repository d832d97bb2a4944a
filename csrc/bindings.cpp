// Schemas of the compiled operations. Outputs are allocated by the caller, so no operation needs a shape function.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(frskd_fast_native, m) {
  m.def(
      "attention_forward(Tensor[] students, Tensor[] teachers, float exponent, Tensor(a!) losses, "
      "Tensor(b!)? student_coefficients, Tensor(c!)? teacher_coefficients, Tensor(d!)? workspace) -> ()");
  m.def(
      "attention_backward(Tensor grad, float scale, Tensor[] features, Tensor coefficients, float exponent, "
      "Tensor(a!)[] gradients) -> ()");
  m.def("attention_map(Tensor feature, float exponent, Tensor(a!) map, Tensor(b!) norm) -> ()");
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
