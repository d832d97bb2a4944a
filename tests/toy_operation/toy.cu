// The toy operation on a CUDA device: a file that registers itself, and that no other file mentions.
#include "cuda/runtime.cuh"
#include "toy.h"

namespace frskd::cuda {
namespace {

constexpr int kThreads = 32;

struct ToyParameters {
  const double* student;  // (N,)
  const double* teacher;  // (N,)
  double* out;            // (N,)
  double scale;
  int64_t count;  // N
};

__global__ void __launch_bounds__(kThreads) toy_difference(const __grid_constant__ ToyParameters parameters) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= parameters.count) return;
  parameters.out[place] = parameters.scale * (parameters.student[place] - parameters.teacher[place]);
}

void toy(const Toy& call) {
  check(call, Device::kCuda);
  const auto& [student, teacher] = call.pair;
  const int64_t count = student.numel();
  const ToyParameters parameters{
      static_cast<const double*>(student.data_ptr()), static_cast<const double*>(teacher.data_ptr()),
      static_cast<double*>(call.out.data_ptr()), call.scale, count};
  const DeviceGuard guard(student);
  launch(toy_difference, ceil_divide(count, kThreads), kThreads, 0, guard.stream(), parameters);
}

FRSKD_CUDA_OPERATION(toy)

}  // namespace
}  // namespace frskd::cuda
