// Marks functions compiled for the host alone (g++) or for host and device (nvcc).
#pragma once

#if defined(__CUDACC__)
#define FRSKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FRSKD_HOST_DEVICE inline __attribute__((always_inline))
#endif
