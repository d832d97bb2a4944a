"""BatchNorm with what surrounds it, keeping its input alone for the backward pass and computing the rest again.

Plain PyTorch keeps two or three maps more for each of these; docs/models.md has the figures. Where a part is not the one that
was built, on GPUs, in evaluation mode, in half precision, with the implementation "reference" and while torch.compile traces
(which plans its memory itself), the modules run as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.batch_norm import foldable, has_hooks
from frskd_fast.ops.convolution import pointwise_backward

from .fixed_padding import FixedPaddingConv2d, padded

PER_CHANNEL = (1, -1, 1, 1)


def _trains(batch_norm: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm` takes the statistics of the batch, in its own full precision, and a gradient is wanted."""
    if torch.compiler.is_compiling() or _dispatch.is_plain(_dispatch.forced()) or not foldable(batch_norm):
        return False
    assert isinstance(batch_norm, nn.BatchNorm2d)
    takes_batch = batch_norm.training and batch_norm.affine and batch_norm.track_running_stats
    real = type(x) is Tensor and x.device.type == "cpu"  # nothing has been measured elsewhere
    if not (takes_batch and real and batch_norm.momentum is not None and torch.is_grad_enabled()):
        return False
    full = x.dtype in (torch.float32, torch.float64)
    return full and x.dtype == batch_norm.weight.dtype and x.numel() > x.shape[1]


def _is_as_built(convolution: nn.Module, bias: bool = False) -> bool:
    """Whether it is a convolution as `Convolution` has the numbers of, with a bias or without one."""
    if type(convolution) not in (nn.Conv2d, FixedPaddingConv2d) or has_hooks(convolution):
        return False
    assert isinstance(convolution, nn.Conv2d)
    pads_zeros = convolution.padding_mode == "zeros" and isinstance(convolution.padding, tuple)
    return pads_zeros and convolution.dilation == (1, 1) and (convolution.bias is not None) == bias


def _is_pixelwise(convolution: nn.Module) -> bool:
    """Whether it is a 1x1 convolution with a bias, each of whose outputs is of one pixel."""
    if not _is_as_built(convolution, bias=True):
        return False
    assert isinstance(convolution, nn.Conv2d)
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.padding == (0, 0)


def _numbers_of(convolution: nn.Conv2d) -> Convolution:
    more = convolution.more if isinstance(convolution, FixedPaddingConv2d) else 0
    return Convolution(convolution.stride, convolution.padding, convolution.groups, more)


def _tracked(batch_norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    """What a function below takes of a BatchNorm, whose counter goes one on."""
    assert isinstance(batch_norm, nn.BatchNorm2d)
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    assert batch_norm.num_batches_tracked is not None and batch_norm.momentum is not None
    batch_norm.num_batches_tracked.add_(1)
    statistics = (batch_norm.running_mean, batch_norm.running_var)
    return batch_norm.weight, batch_norm.bias, *statistics, batch_norm.momentum, batch_norm.eps


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift for each channel."""
    return torch.addcmul(shift.view(PER_CHANNEL), x, scale.view(PER_CHANNEL))


def _normalised(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    scale = gamma * inverse_deviation
    return _affine(x, scale, beta - mean * scale)


def _batch_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, inverse_deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gamma and beta."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, gamma, None, None, mean, inverse_deviation, True, 0.0, [True, True, True]
    )
    return gradients


class Convolution(NamedTuple):
    """The numbers of a convolution without bias: as of `F.conv2d`, and the rows and columns padded at the end alone."""

    stride: Any
    padding: Any
    groups: int
    more: int

    def of(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of `x`."""
        return F.conv2d(padded(x, self.more), weight, None, self.stride, self.padding, 1, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `x` and `weight`."""
        if weight.shape[2:] == (1, 1) and self == Convolution((1, 1), (0, 0), 1, 0):
            return cast(tuple[Tensor, Tensor], pointwise_backward(x, weight, grad, True, True))
        settings = (self.stride, self.padding, (1, 1), False, (0, 0), self.groups, [True, True, False])
        x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            grad, padded(x, self.more), weight, None, *settings
        )
        height, width = x.shape[2:]
        return x_gradient[:, :, :height, :width] if self.more else x_gradient, weight_gradient


class _ConvolvedSwish(torch.autograd.Function):
    """convolution(swish(bn(x)))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        weight: Tensor,
        convolution: Convolution,
    ) -> Tensor:
        out, *statistics = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, gamma, beta, *statistics, weight)
        ctx.convolution = convolution
        return convolution.of(F.silu(out, inplace=True), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, *statistics, weight = ctx.saved_tensors
        normalised = _normalised(x, gamma, beta, *statistics)
        grad, weight_gradient = ctx.convolution.backward(grad, F.silu(normalised), weight)
        grad = torch.ops.aten.silu_backward(grad, normalised)
        gradients = _batch_norm_backward(grad, x, gamma, *statistics)
        return *gradients, None, None, None, None, weight_gradient, None


class _ConvolvedGatedSwish(torch.autograd.Function):
    """convolution(s * sigmoid(expand(swish(reduce(mean over pixels of s))))) with s = swish(bn(x))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        reduce: Tensor,  # (S, C, 1, 1)
        reduce_bias: Tensor,
        expand: Tensor,  # (C, S, 1, 1)
        expand_bias: Tensor,
        weight: Tensor,
        convolution: Convolution,
    ) -> Tensor:
        out, *statistics = torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, momentum, eps)
        F.silu(out, inplace=True)
        pooled = out.mean(dim=(2, 3))
        squeezed = F.linear(pooled, reduce.flatten(1), reduce_bias)
        gate = torch.sigmoid(F.linear(F.silu(squeezed), expand.flatten(1), expand_bias))
        ctx.save_for_backward(x, gamma, beta, *statistics, reduce, expand, pooled, squeezed, gate, weight)
        ctx.convolution = convolution
        return convolution.of(out.mul_(gate[:, :, None, None]), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, *statistics, reduce, expand, pooled, squeezed, gate, weight = ctx.saved_tensors
        normalised = _normalised(x, gamma, beta, *statistics)
        swish = F.silu(normalised)
        gates = gate[:, :, None, None]
        grad, weight_gradient = ctx.convolution.backward(grad, swish * gates, weight)
        gate_gradient = swish.mul_(grad).sum(dim=(2, 3)) * gate * (1 - gate)
        squeezed_gradient = torch.ops.aten.silu_backward(gate_gradient @ expand.flatten(1), squeezed)
        pooled_gradient = squeezed_gradient @ reduce.flatten(1) / (x.shape[2] * x.shape[3])
        grad = torch.addcmul(pooled_gradient[:, :, None, None], grad, gates)
        grad = torch.ops.aten.silu_backward(grad, normalised)
        return (
            *_batch_norm_backward(grad, x, gamma, *statistics),
            *(None, None, None, None),
            (squeezed_gradient.T @ pooled).view_as(reduce),
            squeezed_gradient.sum(0),
            (gate_gradient.T @ F.silu(squeezed)).view_as(expand),
            gate_gradient.sum(0),
            weight_gradient,
            None,
        )


class _AffineNormReLU(torch.autograd.Function):
    """relu(bn(weight * x + bias)) without the map in the middle.

    Its mean is weight * mean(x) + bias and its variance weight^2 * variance(x), so that bias has no gradient, and weight only
    through the epsilon beside the variance.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,  # (C, 1, 1, 1)
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        factor = weight.flatten()
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        variance = variance * factor.square()
        elements = x.numel() // x.shape[1]
        running_mean.lerp_(mean * factor + bias, momentum)
        running_var.lerp_(variance * (elements / (elements - 1)), momentum)
        inverse_deviation = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, gamma, beta, mean, inverse_deviation)
        ctx.eps = eps
        return F.relu(_normalised(x, gamma, beta, mean, inverse_deviation * factor), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, beta, mean, inverse_deviation = ctx.saved_tensors
        factor = inverse_deviation * weight.flatten()
        grad = torch.ops.aten.threshold_backward(grad, _normalised(x, gamma, beta, mean, factor), 0)
        # A weight of 0 would hide the sum of grad * (x - mean) behind a division by 0.
        divisor = torch.where(factor == 0, 1e-20, factor)
        x_gradient, product, beta_gradient = _batch_norm_backward(grad, x, gamma, mean, divisor)
        product = product / divisor
        weight_gradient = gamma * product * (ctx.eps * inverse_deviation**3)
        gradients = (
            x_gradient,
            weight_gradient.view_as(weight),
            torch.zeros_like(beta),
            product * factor,
            beta_gradient,
        )
        return *gradients, None, None, None, None


def convolved_swish(batch_norm: nn.Module, x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """convolution(swish(batch_norm(x)))."""
    if not (_trains(batch_norm, x) and _is_as_built(convolution)):
        return cast(Tensor, convolution(F.silu(batch_norm(x))))
    out: Tensor = _ConvolvedSwish.apply(x, *_tracked(batch_norm), convolution.weight, _numbers_of(convolution))
    return out


def convolved_gated_swish(
    batch_norm: nn.Module, x: Tensor, reduce: nn.Conv2d, expand: nn.Conv2d, convolution: nn.Conv2d
) -> Tensor:
    """convolution(s * sigmoid(expand(swish(reduce(mean over pixels of s))))) with s = swish(batch_norm(x))."""
    linear = all(_is_pixelwise(layer) and layer.groups == 1 for layer in (reduce, expand))
    as_built = linear and _is_as_built(convolution)
    if not (as_built and _trains(batch_norm, x)):
        swish = F.silu(batch_norm(x))
        squeezed = F.silu(reduce(swish.mean(dim=(2, 3), keepdim=True)))
        return cast(Tensor, convolution(swish * torch.sigmoid(expand(squeezed))))
    weights = (reduce.weight, reduce.bias, expand.weight, expand.bias, convolution.weight)
    out: Tensor = _ConvolvedGatedSwish.apply(x, *_tracked(batch_norm), *weights, _numbers_of(convolution))
    return out


class AffineNormReLU(nn.Sequential):
    """relu(bn(weight * x + bias)), with a weight and a bias for each channel: a depthwise 1x1 convolution at key 0, bn at 1."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        convolution, batch_norm, activation = self
        plain = type(activation) is nn.ReLU and not has_hooks(activation) and _is_pixelwise(convolution)
        plain = plain and convolution.in_channels == convolution.out_channels == convolution.groups
        if not (plain and _trains(batch_norm, x)):
            return cast(Tensor, super().forward(x))
        out: Tensor = _AffineNormReLU.apply(x, convolution.weight, convolution.bias, *_tracked(batch_norm))
        return out
