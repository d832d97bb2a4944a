"""Raw calls of the compiled kernels: outputs are allocated here, arithmetic happens in C++ or CUDA (docs/architecture.md)."""
