"""Raw functions of ``channel_moments`` in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

DEVICES = ("cpu",)

_ops = torch.ops.frskd_fast_native


def _pixels_together(x: Tensor) -> bool:
    """Whether the pixels of a channel lie together."""
    row, pixel = x.stride()[2:]
    height, width = x.shape[2:]
    return (pixel == 1 or width == 1) and (row == width or height == 1)


def _together(x: Tensor) -> Tensor:
    """``x``, or a copy of it where neither the pixels of a channel lie together nor the channels of a pixel."""
    _, channel, row, pixel = x.stride()
    height, width = x.shape[2:]
    channels = (channel == 1 or x.shape[1] == 1) and (height == 1 or width == 1 or row == width * pixel)
    return x if _pixels_together(x) or channels else x.contiguous()


def _out(x: Tensor) -> Tensor:
    """An empty map in which the same lies together as in ``x``; ``empty_like`` says that of no pixels without a stride."""
    if _pixels_together(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.channels_last)


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
    out = None if mean is None else _out(together)
    _ops.channel_moments_forward.default(together, mean, std, eps, unbiased, own_mean, own_std, out)
    return own_mean, own_std, x.new_empty(0) if out is None else _like(x, out)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - centre) * scale + shift of each channel of each image, in the dtype and layout of ``x``."""
    together = _together(x)
    out = _out(together)
    numbers = (number.contiguous() for number in (centre, scale, shift))
    _ops.channel_moments_affine.default(together, *numbers, out)
    return _like(x, out)


def sums(grad: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of grad and of grad * (x - centre), each (N, C)."""
    x = _together(x)
    if grad.stride() != x.stride():
        grad = _out(x).copy_(grad)
    centre = centre.contiguous()
    plain, weighted = torch.empty_like(centre), torch.empty_like(centre)
    _ops.channel_moments_sums.default(grad, x, centre, plain, weighted)
    return plain, weighted
