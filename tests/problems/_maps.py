"""What problems of feature maps share: memory layouts, and memory that shows what a kernel forgets to write."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _channels_last(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)


def _sliced(feature: Tensor) -> Tensor:
    """In a larger map of NaN, so that a read beside it shows; every other pixel of a row."""
    n, c, h, w = feature.shape
    storage = feature.new_full((n + 1, c + 2, h + 1, 2 * w + 1), float("nan"))
    view = storage[1:, 1:-1, 1:, 1::2]
    view.copy_(feature)
    return view


def _sliced_channels_last(feature: Tensor) -> Tensor:
    """The same with contiguous channels, as a slice of the channels of a channels_last map has them."""
    n, c, h, w = feature.shape
    storage = feature.new_full((n + 1, h + 1, w + 1, c + 4), float("nan"))
    view = storage[1:, 1:, 1:, 4:].permute(0, 3, 1, 2)
    view.copy_(feature)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda feature: feature,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "transposed": lambda feature: feature.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda feature: feature[:1].expand(feature.shape),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or from the C library huge numbers, so that an output a kernel forgets to write is caught."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return wrapped

    empty, empty_like = torch.empty, torch.empty_like
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    perturb = -6  # M_PERTURB: fill with the complement of a byte, 0 to stop it
    torch.empty, torch.empty_like = poison(empty), poison(empty_like)  # type: ignore[assignment]
    if mallopt is not None:
        mallopt(perturb, 0x01)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like  # type: ignore[assignment]
        if mallopt is not None:
            mallopt(perturb, 0)
