"""Raw calls of the compiled kernels: outputs are allocated here, arithmetic happens in C++ or CUDA (docs/contracts.md)."""

from frskd_fast import _extension

# Loading registers the operators; a missing library was already reported by whoever chose this implementation.
_extension.cpu_library_problem()
