"""Moments of channels and their transfer (adaptive instance normalisation), with gradients that are written out.

Plain PyTorch on every device. A CPU takes it block by block, because there a temporary as large as a map costs more than the
arithmetic, and `torch.var` is many times slower than the two sums that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import kept
from frskd_fast.reference import moments as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.moments import ChannelMoments as ChannelMoments

# Elements that a CPU takes at a time: block and scratch memory stay in its cache, and calls are few.
BLOCK = 2**18


def _blocks(x: Tensor) -> Iterator[slice]:
    """Images of `x` that are taken at a time; all of them where that is not the CPU."""
    images = x.shape[0]
    step = max(1, BLOCK // x[0].numel()) if x.device.type == "cpu" and images else max(1, images)
    return (slice(begin, min(begin + step, images)) for begin in range(0, images, step))


def _scratch(x: Tensor) -> Tensor:
    """Memory for one block in the dtype of the arithmetic, laid out as `x`."""
    first = next(_blocks(x), slice(0, 0))
    return torch.empty_like(x[first], dtype=accumulate_dtype(x.dtype))


def _per_pixel(channels: Tensor) -> Tensor:
    return channels[:, :, None, None]


def _moments(x: Tensor, eps: float, unbiased: bool) -> ChannelMoments:
    """Means, then the sums of squares around them."""
    if x.device.type != "cpu":
        return reference.channel_moments(x, eps, unbiased)
    scratch = _scratch(x)
    pixels = x.shape[2] * x.shape[3]
    mean, variance = (scratch.new_empty(x.shape[:2]) for _ in range(2))
    for block in _blocks(x):
        part, centred = x[block], scratch[: block.stop - block.start]
        torch.sum(part, (2, 3), dtype=mean.dtype, out=mean[block])
        mean[block].div_(pixels)
        torch.sub(part, _per_pixel(mean[block]), out=centred)
        torch.mul(centred, centred, out=centred)
        torch.sum(centred, (2, 3), out=variance[block])
    return ChannelMoments(mean, variance.div_(pixels - int(unbiased)).add_(eps).sqrt_())


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift of each channel of each image, in the dtype and layout of `x`."""
    scale, shift = _per_pixel(scale), _per_pixel(shift)
    # Where channels lie together, one operation is as fast as a copy; over planes, two are faster than one.
    together = _dispatch.layout_of(x) == "channels_last" and x.dtype == scale.dtype
    if together or x.device.type != "cpu":
        return torch.addcmul(shift, x, scale).to(x.dtype)
    out = torch.empty_like(x)
    scratch = _scratch(x) if x.dtype != scale.dtype else None
    for block in _blocks(x):
        wide = out[block] if scratch is None else scratch[: block.stop - block.start]
        torch.mul(x[block], scale[block], out=wide).add_(shift[block])
        if scratch is not None:
            out[block].copy_(wide)
    return out


def _sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sum grad and sum grad * x over the pixels, each (N, C)."""
    scratch = _scratch(x)
    plain, weighted = (scratch.new_empty(x.shape[:2]) for _ in range(2))
    for block in _blocks(x):
        part, product = grad[block], scratch[: block.stop - block.start]
        torch.sum(part, (2, 3), dtype=plain.dtype, out=plain[block])
        # One factor is wide first: a product of two halves would be rounded.
        torch.mul(product.copy_(part) if part.dtype != product.dtype else part, x[block], out=product)
        torch.sum(product, (2, 3), out=weighted[block])
    return plain, weighted


class _ChannelMoments(torch.autograd.Function):
    """With D = H*W - 1 or H*W, dx = dmean / (H*W) + dstd * (x - mean) / (D * std)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
        mean, std = _moments(x, eps, unbiased)
        ctx.save_for_backward(x, mean, std)
        ctx.unbiased = unbiased
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, mean, std = ctx.saved_tensors
        mean_grad, std_grad = grads
        pixels = x.shape[2] * x.shape[3]
        scale = std_grad / (std * (pixels - int(ctx.unbiased)))
        return _affine(x, scale, mean_grad / pixels - mean * scale), None, None


class _Transfer(torch.autograd.Function):
    """y = s * (x - m) / d + n for x of moments m, d: dn = sum dy, ds = sum dy * (x - m) / d; m, d count as given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own_mean: Tensor, own_std: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        scale = reference.scale_between(own_std, std)
        ctx.save_for_backward(x, own_mean, own_std, scale)
        return _affine(x, scale, mean - own_mean * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, own_mean, own_std, scale = ctx.saved_tensors
        (grad,) = grads
        content = _affine(grad, scale, torch.zeros_like(scale)) if ctx.needs_input_grad[0] else None
        plain, weighted = _sums(grad, x)
        std_grad = (weighted - own_mean * plain) / own_std
        return content, -scale * plain, -scale * std_grad, plain, std_grad


def checked_map(x: Any, name: str, unbiased: bool) -> Tensor:
    """Raise unless `x` is a map (N, C, H, W) whose channels have a standard deviation."""
    feature = _checks.feature_map(x, name)
    if unbiased and feature.shape[2] * feature.shape[3] == 1:
        raise ValueError(
            f"{name} has shape {tuple(feature.shape)}, but more than one pixel was wanted: the unbiased variance divides by "
            "H * W - 1; pass unbiased=False."
        )
    return feature


def _checked_channels(value: Any, name: str, content: Tensor) -> Tensor:
    """One number for each channel of each image, in the dtype of the arithmetic."""
    channels = _checks.floating_tensor(value, name)
    if channels.shape != content.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(channels.shape)}, but one number for each channel of each image of content, "
            f"{tuple(content.shape[:2])}, was wanted."
        )
    if channels.device != content.device:
        raise ValueError(
            f"{name} is on {channels.device}, but content is on {content.device} and one device was wanted."
        )
    return channels.to(accumulate_dtype(content.dtype))


def _is_plain(impl: str, x: Tensor) -> bool:
    return _dispatch.is_plain(_dispatch.choose_for("moments", impl, x)) or _dispatch.left_to_compiler("moments")


def channel_moments(x: Any, eps: float, unbiased: bool, impl: str, name: str = "x") -> ChannelMoments:
    """Checks, choice of implementation and autograd; (N, C, H, W) -> 2 x (N, C). Errors call the map `name`."""
    x, eps = kept(checked_map(x, name, unbiased)), _checks.positive_number(eps, "eps")
    if _is_plain(impl, x):
        return reference.channel_moments(x, eps, unbiased)
    return ChannelMoments(*_ChannelMoments.apply(x, eps, unbiased))


def adain(
    content: Any, mean: Any, std: Any, eps: float, unbiased: bool, moments: ChannelMoments | None, impl: str
) -> Tensor:
    """Checks, choice of implementation and autograd; (N, C, H, W) and 2 x (N, C) -> (N, C, H, W)."""
    content = kept(checked_map(content, "content", unbiased))
    mean, std = _checked_channels(mean, "mean", content), _checked_channels(std, "std", content)
    if moments is None:
        moments = channel_moments(content, eps, unbiased, impl, "content")
    else:
        moments = ChannelMoments(*(kept(_checked_channels(value, "moments", content)) for value in moments))
    if _is_plain(impl, content):
        return reference.transfer(content, moments, mean, std)
    transferred: Tensor = _Transfer.apply(content, *moments, mean, std)
    return transferred
