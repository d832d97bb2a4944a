#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace frskd {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  if (count <= 0) return;
  if (count <= grain) {
    body(0, count, context);
    return;
  }
  // PyTorch's function replaces what a thread throws by a message of its own.
  std::exception_ptr failure;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](std::int64_t begin, std::int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

void out_of_memory(std::int64_t bytes) {
  STD_TORCH_CHECK(
      false, "No memory is left for ", bytes, " bytes that a kernel works in; use smaller maps or batches.");
  __builtin_unreachable();
}

}  // namespace frskd
