"""Which implementation of an operation runs: ``reference``, ``cpu``, ``triton`` or ``cuda``."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from frskd_fast import _extension

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")
PLAIN = "reference"


class Line(NamedTuple):
    """One line of the table: the calls it is for, and the order in which "auto" tries implementations of them."""

    implementations: tuple[str, ...]  # in order; the plain form stands behind them all
    dtypes: tuple[torch.dtype, ...] = ()  # of the inputs; () any, as in the next two
    layouts: tuple[str, ...] = ()  # "channels_last", "nchw" or "rows", see `layout_of`
    forms: tuple[str, ...] = ()  # what kind of call it is, in the words of its operation
    least_size: int = 0  # elements of the first input
    evidence: str = "not measured on such a device"  # the file of bench/results that says so


_CPU = Line(("cpu",), evidence="2026-11-30-cpu-amd-epyc.json")
_GPU = Line(("cuda", "triton"))

# The first line that fits decides; (operation, kind of device) -> lines. `ANY` serves those that are not named. Besides the
# operations there are lines for what is built of several or of none and chosen as a whole: "objective" (FRSKD's loss:
# attention, logits and combine), "self_teacher", "hints", "similarity" (cosines) and "moments".
ANY = ""
TABLE: dict[tuple[str, str], tuple[Line, ...]] = {
    (ANY, "cpu"): (_CPU,),
    (ANY, "cuda"): (_GPU,),
}

# What a compiler fuses by itself with its neighbours, while a kernel of ours is opaque to it: the means of one head of logits;
# and sums and products of channels, of which it makes fewer passes than eager blocks do.
PLAIN_WHEN_TRACED = ("logits_means", "moments")

# The layout to which maps are brought before an operation takes many steps: one copy costs far less than planes do.
MAPS = {("self_teacher", "cpu"): torch.channels_last}

# Where the weight gradient of a 1x1 convolution of channels_last maps is taken as a matrix product, which on a CPU is faster.
MATRIX_PRODUCTS = ("cpu",)

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_modules: dict[tuple[str, str], ModuleType] = {}
_last: dict[str, str] = {}


def check_name(name: str, source: str) -> str:
    """``name`` if it is "auto" or a known implementation."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        known = ", ".join(repr(known) for known in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{source} is {name!r}, but the known implementations are {known}.")
    return name


class _Forced(threading.local):
    """The nested choices of `use_impl` in each thread. (`torch.compile` cannot trace a ContextVar.)"""

    names: tuple[str, ...] = (
        check_name(os.environ.get("FRSKD_FAST_IMPL", "auto"), "the environment variable FRSKD_FAST_IMPL"),
    )


_forced = _Forced()


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Run every operation inside the ``with`` block by the named implementation.

    The choice holds for the calling thread and wins over ``impl="auto"``, not over an explicit ``impl=``. The environment
    variable ``FRSKD_FAST_IMPL`` holds for all threads, such as autograd's own, in which CUDA's checkpointed forward passes
    are repeated. A function that ``torch.compile`` has already traced keeps the implementation it was traced with.

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
    outside = _forced.names
    _forced.names = (*outside, name)
    try:
        yield
    finally:
        _forced.names = outside


def forced() -> str:
    """What ``impl="auto"`` is replaced by at this moment: the innermost ``use_impl``, or the environment's choice."""
    return _forced.names[-1]


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
    """Remember for ``last_impl`` that ``operation`` ran by implementation ``name``; what is only traced did not run."""
    if not torch.compiler.is_compiling():
        _last[operation] = name


def problem(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why implementation ``name`` cannot serve tensors of this device and dtype, as a clause; None when it can."""
    if name == PLAIN:
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


def layout_of(tensor: Tensor) -> str:
    """The word of the table for a layout.

    It is "channels_last" where the channels of a pixel lie together (also in slices of the channels), else "nchw"; and
    "rows" for anything but maps.
    """
    if tensor.dim() != 4:
        return "rows"
    return "channels_last" if tensor.stride(1) == 1 and tensor.shape[1] > 1 else "nchw"


def choose(
    operation: str,
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    *,
    layout: str = "",
    form: str = "",
    size: int = 0,
) -> str:
    """The implementation for this call: the requested one, else the forced one, else the first of the table that works.

    Args:
        operation: its name, as in `TABLE`.
        requested: the argument ``impl`` of the call.
        device_type, dtype: of the inputs.
        layout: `layout_of` the first input.
        form: what kind of call it is, in the words of the operation.
        size: elements of the first input.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when the requested or forced implementation cannot run here, with the reason and what to do.
    """
    name = check_name(requested, "the argument impl")
    if name == "auto":
        name = _forced.names[-1]
    if torch._C._are_functorch_transforms_active():
        # Of torch.func, which takes no autograd.Function such as those of the kernels.
        if name not in ("auto", PLAIN):
            raise RuntimeError(
                f"impl={name!r} was asked for, but transforms of torch.func (grad, vmap, jvp, ...) go through plain PyTorch "
                "only; use impl='reference' or leave impl='auto'."
            )
        return PLAIN
    if name != "auto":
        reason = problem(name, device_type, dtype)
        if reason is None and not (is_plain(name) or _serves(operation, name)):
            offered = [repr(other) for other in IMPLEMENTATIONS if implements(operation, other)]
            reason = f"{operation} has no such kernels; use {' or '.join([*offered, repr(PLAIN)])}"
        if reason is not None:
            raise RuntimeError(f"impl={name!r} was asked for, but {reason}.")
        return name
    for line in TABLE.get((operation, device_type)) or TABLE.get((ANY, device_type), ()):
        if (
            (line.dtypes and dtype not in line.dtypes)
            or (line.layouts and layout not in line.layouts)
            or (line.forms and form not in line.forms)
            or size < line.least_size
        ):
            continue
        for candidate in line.implementations:
            if _serves(operation, candidate) and problem(candidate, device_type, dtype) is None:
                return candidate
        if "cpu" in line.implementations and device_type == "cpu" and dtype in _KERNEL_DTYPES:
            _extension.warn_of_missing_kernels()
        break
    return PLAIN


# What torch.compiler.assume_constant_result sets: a traced graph takes the choice as a constant. Calling it here would
# import the whole compiler (and Triton) with the package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_for(operation: str, requested: str, tensor: Tensor, form: str = "") -> str:
    """`choose` for a call whose first input is ``tensor``. A traced graph serves every batch, so there the size is left out."""
    size = 0 if torch.compiler.is_compiling() else tensor.numel()
    return choose(
        operation, requested, tensor.device.type, tensor.dtype, layout=layout_of(tensor), form=form, size=size
    )


def is_plain(name: str) -> bool:
    """Whether ``name`` is the plain PyTorch of `frskd_fast.reference`, which has no raw functions and needs none."""
    return name == PLAIN


def left_to_compiler(operation: str) -> bool:
    """Whether small PyTorch operations take the place of a kernel, because a graph is being traced."""
    return torch.compiler.is_compiling() and operation in PLAIN_WHEN_TRACED


def implements(operation: str, name: str) -> bool:
    """Whether implementation ``name`` has raw functions of ``operation``."""
    return (operation, name) in _modules or _in_package(operation, name)


implements._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serves(operation: str, name: str) -> bool:
    """Whether implementation ``name`` may be chosen: what has no raw functions at all is composed of operations that have."""
    return implements(operation, name) or not any(implements(operation, other) for other in IMPLEMENTATIONS)


@functools.cache
def _in_package(operation: str, name: str) -> bool:
    """Whether the package has a file of ``operation`` for implementation ``name``; that of Triton is found, not imported."""
    module = _module_name(operation, name)
    if is_plain(name) or importlib.util.find_spec(module.rpartition(".")[0]) is None:
        return False
    if importlib.util.find_spec(module) is None:
        return False
    return name == "triton" or name in getattr(importlib.import_module(module), "DEVICES", ("cpu", "cuda"))


def _module_name(operation: str, name: str) -> str:
    package = "kernels" if name == "triton" else "native"
    return f"frskd_fast.{package}.{operation}"


def memory_format_of(operation: str, name: str) -> torch.memory_format | None:
    """The layout to which implementation ``name`` of ``operation`` wants its maps brought; None leaves them as they are."""
    return MAPS.get((operation, name))


def raw(operation: str, name: str) -> ModuleType:
    """The module with the raw functions of ``operation`` (docs/contracts.md) for implementation ``name``."""
    key = (operation, name)
    module = _modules.get(key)
    if module is None:
        module = provide(operation, name, importlib.import_module(_module_name(operation, name)))
    return module


def provide(operation: str, name: str, module: ModuleType) -> ModuleType:
    """Use ``module`` as implementation ``name`` of ``operation``, for instance of one that lives outside the package."""
    _modules[operation, name] = module
    return module
