"""Loads the compiled libraries ``_C`` (CPU) and ``_C_cuda`` once, and remembers in one sentence why one is missing."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_AGAIN = "run `pip install --no-build-isolation .` again"
_REBUILD = (
    f"install a C++ compiler (and nvcc for CUDA) and {_AGAIN}; `python -m frskd_fast.env_report` shows what was found"
)


@functools.cache
def _build_record() -> dict[str, Any]:
    """What setup.py left in a package without kernels: the reason and advice, as clauses, and whether that was asked for."""
    try:
        record = json.loads((_HERE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _not_built() -> str | None:
    """The reason that setup.py has recorded, and what to do; None where it has recorded none."""
    record = _build_record()
    if "without_kernels" not in record:
        return None
    return f"{record['without_kernels']}; {record.get('advice', 'mend that')}, then {_AGAIN}"


@functools.cache
def warn_of_missing_kernels() -> None:
    """Warn, once in a process, of operations in plain PyTorch where a build could not make kernels and nobody saw it."""
    reason = _not_built()
    if reason is not None and not _build_record().get("asked"):
        warnings.warn(
            "frskd_fast computes in plain PyTorch, which is slower, because its kernels were not built: "
            f"{reason}. FRSKD_FAST_IMPL=reference asks for plain PyTorch, without a warning.",
            RuntimeWarning,
            stacklevel=3,
        )


def _load(stem: str) -> str | None:
    """Load ``frskd_fast/<stem>.*``; None on success, otherwise the reason as a sentence.

    A library that is there and does not load is warned of, because nobody asked for that.
    """
    candidates = sorted(path for path in _HERE.glob(f"{stem}.*") if path.suffix in {".so", ".pyd", ".dylib"})
    if not candidates:
        return f"the compiled library {stem} was not built: {_not_built() or _REBUILD}"
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        problem = f"the compiled library {candidates[0].name} does not load ({error}): {_AGAIN}, with this PyTorch"
        warnings.warn(f"frskd_fast computes without it, which may be slower: {problem}.", RuntimeWarning, stacklevel=2)
        return problem
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
