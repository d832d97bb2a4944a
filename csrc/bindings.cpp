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
}
