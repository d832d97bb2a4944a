// PyTorch's threads, as the entry points lend them to the kernels.
#pragma once

#include "views.h"

namespace frskd {

int thread_count();
void run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context);

}  // namespace frskd
