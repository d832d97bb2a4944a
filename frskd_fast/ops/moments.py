"""Moments of channels and their transfer (adaptive instance normalisation), with gradients that are written out.

By the kernels of operation ``channel_moments`` where the chosen implementation has them, else in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks
from frskd_fast.ops import channel_moments as kernels
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import kept
from frskd_fast.reference import moments as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.moments import ChannelMoments as ChannelMoments


def _has_kernels(impl: str) -> bool:
    return _dispatch.implements("channel_moments", impl)


def _per_pixel(channels: Tensor) -> Tensor:
    return channels[:, :, None, None]


def _affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, impl: str) -> Tensor:
    """(x - centre) * scale + shift of each channel of each image, in the dtype and layout of `x`."""
    if _has_kernels(impl):
        return kernels.affine(x, centre, scale, shift, impl)
    return torch.addcmul(_per_pixel(shift), x - _per_pixel(centre), _per_pixel(scale)).to(x.dtype)


def _sums(grad: Tensor, x: Tensor, centre: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """sum grad and sum grad * (x - centre) over the pixels, each (N, C)."""
    if _has_kernels(impl):
        return kernels.sums(grad, x, centre, impl)
    return grad.sum((2, 3), dtype=centre.dtype), (grad * (x - _per_pixel(centre))).sum((2, 3))


class _ChannelMoments(torch.autograd.Function):
    """With D = H*W - 1 or H*W, dx = dmean / (H*W) + dstd * (x - mean) / (D * std)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, unbiased: bool, impl: str) -> tuple[Tensor, Tensor]:
        if _has_kernels(impl):
            mean, std, _ = kernels.forward(x, None, None, eps, unbiased, impl)
        else:
            mean, std = reference.channel_moments(x, eps, unbiased)
        ctx.save_for_backward(x, mean, std)
        ctx.settings = unbiased, impl
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        unbiased, impl = ctx.settings
        x, mean, std = ctx.saved_tensors
        mean_grad, std_grad = grads
        pixels = x.shape[2] * x.shape[3]
        scale = std_grad / (std * (pixels - int(unbiased)))
        return _affine(x, mean, scale, mean_grad / pixels, impl), None, None, None


class _Transfer(torch.autograd.Function):
    """y = s * (x - m) / d + n for x of moments m, d: dn = sum dy, ds = sum dy * (x - m) / d; m, d count as given.

    Without m and d they are taken of x, which then has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own_mean: Tensor | None,
        own_std: Tensor | None,
        mean: Tensor,
        std: Tensor,
        eps: float,
        unbiased: bool,
        impl: str,
    ) -> Tensor:
        if own_mean is None or own_std is None:
            own_mean, own_std, out = kernels.forward(x, mean.contiguous(), std.contiguous(), eps, unbiased, impl)
        else:
            out = _affine(x, own_mean, reference.scale_between(own_std, std), mean, impl)
        ctx.save_for_backward(x, own_mean, own_std, std)
        ctx.impl = impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, own_mean, own_std, std = ctx.saved_tensors
        (grad,) = grads
        scale = std / own_std
        zero = torch.zeros_like(scale)
        content = _affine(grad, zero, scale, zero, ctx.impl) if ctx.needs_input_grad[0] else None
        plain, weighted = _sums(grad, x, own_mean, ctx.impl)
        std_grad = weighted / own_std
        own = (-scale * plain, -scale * std_grad) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return content, *own, plain, std_grad, None, None, None


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


def _chosen(impl: str, x: Tensor) -> str:
    """The implementation, plain PyTorch where a graph is traced."""
    name = _dispatch.choose_for("moments", impl, x)
    return _dispatch.PLAIN if _dispatch.left_to_compiler("moments") else name


def channel_moments(x: Any, eps: float, unbiased: bool, impl: str, name: str = "x") -> ChannelMoments:
    """Checks, choice of implementation and autograd; (N, C, H, W) -> 2 x (N, C). Errors call the map `name`."""
    x, eps = kept(checked_map(x, name, unbiased)), _checks.positive_number(eps, "eps")
    chosen = _chosen(impl, x)
    if _dispatch.is_plain(chosen):
        return reference.channel_moments(x, eps, unbiased)
    return ChannelMoments(*_ChannelMoments.apply(x, eps, unbiased, chosen))


def adain(
    content: Any, mean: Any, std: Any, eps: float, unbiased: bool, moments: ChannelMoments | None, impl: str
) -> Tensor:
    """Checks, choice of implementation and autograd; (N, C, H, W) and 2 x (N, C) -> (N, C, H, W)."""
    content = kept(checked_map(content, "content", unbiased))
    mean, std = _checked_channels(mean, "mean", content), _checked_channels(std, "std", content)
    eps, chosen = _checks.positive_number(eps, "eps"), _chosen(impl, content)
    if moments is not None:
        moments = ChannelMoments(*(kept(_checked_channels(value, "moments", content)) for value in moments))
    elif content.requires_grad or not _has_kernels(chosen):
        moments = channel_moments(content, eps, unbiased, chosen, "content")
    if moments is not None and _dispatch.is_plain(chosen):
        return reference.transfer(content, moments, mean, std)
    transferred: Tensor = _Transfer.apply(content, *(moments or (None, None)), mean, std, eps, unbiased, chosen)
    return transferred
