"""``python -m frskd_fast.env_report``: what this installation can run, and in a sentence why the rest is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

import frskd_fast
from frskd_fast import _dispatch, _extension

_VARIABLES = ("FRSKD_FAST_IMPL", "FRSKD_FAST_BUILD", "FRSKD_FAST_CPU", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text, one fact a line.

    Example:
        >>> "implementation reference: ready" in report()
        True
    """
    cuda = torch.cuda.is_available()
    lines = [
        f"frskd_fast {frskd_fast.__version__} in {os.path.dirname(os.path.abspath(frskd_fast.__file__))}",
        f"python {sys.version.split()[0]}, {platform.platform()}, {platform.machine()}",
        f"torch {torch.__version__}, its CUDA: {torch.version.cuda or 'none'}, its HIP: {torch.version.hip or 'none'}",
        f"triton {_version('triton')}, numpy {_version('numpy')}",
        f"threads {torch.get_num_threads()}, vector instructions torch uses: {torch.backends.cpu.get_cpu_capability()}",
        f"GPU: {torch.cuda.get_device_name() if cuda else 'none visible'}",
    ]
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    for device in ["cpu", "cuda"] if cuda else ["cpu"]:
        for dtype in (torch.float32, torch.float64):
            lines.append(f"impl='auto' on {device}, {dtype}: {_dispatch.choose(_dispatch.ANY, 'auto', device, dtype)}")
    problems = {
        "reference": None,
        "cpu": _extension.cpu_library_problem(),
        "triton": _extension.triton_problem() or (None if cuda else "no GPU is visible"),
        "cuda": _extension.cuda_library_problem() or (None if cuda else "no GPU is visible"),
    }
    for name, problem in problems.items():
        lines.append(f"implementation {name}: {'ready' if problem is None else 'not available: ' + problem}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
