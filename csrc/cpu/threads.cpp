#include "threads.h"

#include <torch/csrc/stable/ops.h>

namespace frskd {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  if (count <= 0) return;
  if (count <= grain) {
    body(0, count, context);
    return;
  }
  torch::stable::parallel_for(
      0, count, grain, [body, context](std::int64_t begin, std::int64_t end) { body(begin, end, context); });
}

}  // namespace frskd
