"""Raw calls of the compiled kernels: outputs are allocated here, arithmetic happens in C++ or CUDA (docs/contracts.md)."""

from torch import Tensor

from frskd_fast import _extension

# Loading registers the operators; a missing library was already reported by whoever chose this implementation.
_extension.cpu_library_problem()


def needs_workspace(tensor: Tensor) -> bool:
    """Whether kernels take room for their partial results from the caller: on a device; the CPU kernels have their own."""
    return tensor.is_cuda
