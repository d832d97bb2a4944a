"""Fresh memory that holds NaN, so that an output a kernel forgets to write is seen."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

    return wrapped


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the ``with`` block ``torch.empty`` and ``torch.empty_like`` return NaN, and the C library huge numbers."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    perturb = -6  # M_PERTURB: fill with the complement of a byte, 0 to stop it
    with ExitStack() as stack:
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, _poisoned(getattr(torch, name))))
        if mallopt is not None:
            mallopt(perturb, 0x01)
            stack.callback(mallopt, perturb, 0)
        yield
