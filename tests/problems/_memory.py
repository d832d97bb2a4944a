"""Fresh memory that holds NaN, so that an output a kernel forgets to write is seen."""

from __future__ import annotations

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
    """Inside the ``with`` block ``torch.empty`` and ``torch.empty_like`` return NaN."""
    with ExitStack() as stack:
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, _poisoned(getattr(torch, name))))
        yield
