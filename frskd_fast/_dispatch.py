"""Which implementation of an operation runs: ``reference``, ``cpu``, ``triton`` or ``cuda``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from frskd_fast import _extension

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# The order in which "auto" tries the implementations of a device. Not yet ordered by measurement on a GPU.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_modules: dict[tuple[str, str], ModuleType] = {}
_last: dict[str, str] = {}


def check_name(name: str, source: str) -> str:
    """``name`` if it is "auto" or a known implementation."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        known = ", ".join(repr(known) for known in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{source} is {name!r}, but the known implementations are {known}.")
    return name


_forced = [check_name(os.environ.get("FRSKD_FAST_IMPL", "auto"), "the environment variable FRSKD_FAST_IMPL")]


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block by the named implementation.

    The choice holds for the whole process (all threads) and wins over ``impl="auto"``, not over an explicit ``impl=``. A
    function that ``torch.compile`` has already traced keeps the implementation it was traced with.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"auto"``.

    Raises:
        ValueError: for an unknown name. A known one that is missing on this machine raises at the first call.

    Example:
        >>> import torch, frskd_fast
        >>> with frskd_fast.use_impl("reference"):
        ...     loss = frskd_fast.functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
        >>> frskd_fast.last_impl()["logits"]
        'reference'
    """
    check_name(name, "use_impl's argument name")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str:
    """What ``impl="auto"`` is replaced by at this moment: the innermost ``use_impl``, or the environment's choice."""
    return _forced[-1]


def last_impl() -> dict[str, str]:
    """Return which implementation each operation used in its latest call, as ``{operation: implementation}``.

    Returns:
        A new dict; operations that have not run in this process are absent.

    Example:
        >>> import torch, frskd_fast
        >>> _ = frskd_fast.functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), impl="reference")
        >>> frskd_fast.last_impl()["logits"]
        'reference'
    """
    return dict(_last)


def record(operation: str, name: str) -> None:
    """Remember for ``last_impl`` that ``operation`` ran by implementation ``name``."""
    _last[operation] = name


def problem(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why implementation ``name`` cannot serve tensors of this device and dtype, as a clause; None when it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if device_type != "cpu":
            return f"it computes on the CPU and the tensors are on {device_type!r}; move them or leave impl='auto'"
        reason = _extension.cpu_library_problem()
    elif name == "cuda":
        if device_type != "cuda":
            return (
                f"it computes on a CUDA device and the tensors are on {device_type!r}; move them or leave impl='auto'"
            )
        reason = _extension.cuda_library_problem()
    else:
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it computes on a GPU and the tensors are on {device_type!r}; move them or leave impl='auto'"
        reason = _extension.triton_problem()
    if reason is None and dtype not in _KERNEL_DTYPES:
        reason = f"it does not compute in {dtype}; use impl='reference'"
    return reason


def choose(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The implementation for this call: the requested one, else the forced one, else the first that works.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when the requested or forced implementation cannot run here, with the reason and what to do.
    """
    name = check_name(requested, "the argument impl")
    if name == "auto":
        name = _forced[-1]
    if name != "auto":
        reason = problem(name, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"impl={name!r} was asked for, but {reason}.")
        return name
    for candidate in _PREFERENCE.get(device_type, ("reference",)):
        if problem(candidate, device_type, dtype) is None:
            return candidate
    return "reference"


# What torch.compiler.assume_constant_result sets: a traced graph takes the choice as a constant. Calling it here would
# import the whole compiler (and Triton) with the package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def raw(operation: str, name: str) -> ModuleType:
    """The module with the raw functions of ``operation`` (docs/architecture.md) for implementation ``name``."""
    key = (operation, name)
    module = _modules.get(key)
    if module is None:
        package = "frskd_fast.kernels" if name == "triton" else "frskd_fast.native"
        module = _modules[key] = importlib.import_module(f"{package}.{operation}")
    return module
