"""Operation ``channel_moments``: what AdaIN takes of the channels of each image, in as few passes as there are dependencies.

Only `ops/moments.py` uses it; its reference is `reference/moments.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frskd_fast.ops import _table
from frskd_fast.reference.dtypes import accumulate_dtype


def _numbers(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


@_table.register("channel_moments")
def forward(
    x: Tensor, mean: Tensor | None, std: Tensor | None, eps: float, unbiased: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of x, each (N, C), and x with the given moments, which is empty without them."""
    return _numbers(x), _numbers(x), x.new_empty(0) if mean is None else torch.empty_like(x)


@_table.register("channel_moments")
def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, impl: str) -> Tensor:
    """(x - centre) * scale + shift of each channel of each image, in the dtype and layout of x."""
    return torch.empty_like(x)


@_table.register("channel_moments")
def sums(grad: Tensor, x: Tensor, centre: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of grad and of grad * (x - centre), each (N, C)."""
    return _numbers(x), _numbers(x)
