"""Loads the compiled libraries ``_C`` (CPU) and ``_C_cuda`` once, and remembers in one sentence why one is missing."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_REBUILD = (
    "install a C++ compiler (and nvcc for CUDA) and run `pip install --no-build-isolation .` again; "
    "`python -m frskd_fast.env_report` shows what was found"
)


def _load(stem: str) -> str | None:
    """Load ``frskd_fast/<stem>.*``; None on success, otherwise the reason as a sentence."""
    candidates = sorted(path for path in _HERE.glob(f"{stem}.*") if path.suffix in {".so", ".pyd", ".dylib"})
    if not candidates:
        return f"the compiled library {stem} was not built: {_REBUILD}"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        return f"the compiled library {candidates[0].name} does not load ({error}): {_REBUILD}"
    return None


@functools.cache
def cpu_library_problem() -> str | None:
    """Why the C++ kernels cannot be used, or None when they can."""
    return _load("_C")


@functools.cache
def cuda_library_problem() -> str | None:
    """Why the CUDA kernels cannot be used, or None when they can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of PyTorch to use impl='cuda'"
    return cpu_library_problem() or _load("_C_cuda")


@functools.cache
def triton_problem() -> str | None:
    """Why the Triton kernels cannot be used, or None when they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed: `pip install triton` (it comes with the CUDA builds of PyTorch)"
    return None
