"""Raw functions of ``channel_moments`` in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

DEVICES = ("cpu",)

_ops = torch.ops.frskd_fast_native


def _together(x: Tensor) -> Tensor:
    """``x``, or a copy of it where neither the pixels of a channel lie together nor the channels of a pixel."""
    _, channel, row, pixel = x.stride()
    height, width = x.shape[2:]
    if (pixel == 1 or width == 1) and (row == width or height == 1):
        return x
    if channel == 1 and (height == 1 or width == 1 or row == width * pixel):
        return x
    return x.contiguous()


def _like(x: Tensor, out: Tensor) -> Tensor:
    """``out``, made of a copy of ``x``, in the layout of ``x``."""
    wanted = torch.empty_like(x)
    return out if out.stride() == wanted.stride() else wanted.copy_(out)


def forward(
    x: Tensor, mean: Tensor | None, std: Tensor | None, eps: float, unbiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of ``x``, each (N, C), and ``x`` with the given moments, which is empty without them."""
    together = _together(x)
    own_mean, own_std = (torch.empty(x.shape[:2], dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    out = None if mean is None else torch.empty_like(together)
    _ops.channel_moments_forward.default(together, mean, std, eps, unbiased, own_mean, own_std, out)
    return own_mean, own_std, x.new_empty(0) if out is None else _like(x, out)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - centre) * scale + shift of each channel of each image, in the dtype and layout of ``x``."""
    together = _together(x)
    out = torch.empty_like(together)
    numbers = (number.contiguous() for number in (centre, scale, shift))
    _ops.channel_moments_affine.default(together, *numbers, out)
    return _like(x, out)


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of grad and of grad * (x - centre), each (N, C)."""
    x = _together(x)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    plain, weighted = torch.empty_like(centre), torch.empty_like(centre)
    _ops.channel_moments_sums.default(grad, x, centre, plain, weighted)
    return plain, weighted
