"""Convolutions of the self-teacher (depthwise 3x3 and pointwise) and their gradients, for backward passes written by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast import _dispatch

# (C, 1, 3, 3) is a depthwise weight, (out, C, 1, 1) a pointwise one.
_DEPTHWISE_SIDE = 3


def is_depthwise(weight: Tensor) -> bool:
    """Whether ``weight`` is that of a depthwise 3x3 convolution, (C, 1, 3, 3); else it is pointwise, (out, C, 1, 1)."""
    return weight.shape[2] == _DEPTHWISE_SIDE


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """The depthwise or pointwise convolution of ``x`` (N, C, H, W), at the same size."""
    if is_depthwise(weight):
        return F.conv2d(x, weight, padding=1, groups=x.shape[1])
    return F.conv2d(x, weight)


def _convolution_backward(
    x: Tensor, weight: Tensor, grad: Tensor, padding: int, groups: int, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's own gradients of a convolution of stride 1 without bias."""
    x_gradient, gradient, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, [*needs, False]
    )
    return x_gradient, gradient


def _pointwise_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """grad^T x over all pixels: (out, in, 1, 1)."""
    rows_of = (tensor.permute(0, 2, 3, 1) for tensor in (x, grad))
    x_rows, grad_rows = (rows.reshape(-1, rows.shape[3]) for rows in rows_of)
    return torch.mm(grad_rows.t(), x_rows).view(weight.shape)


def pointwise_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a 1x1 convolution."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    product = need_weight and channels_last and x.device.type in _dispatch.MATRIX_PRODUCTS
    x_gradient, by_convolution = None, None
    if need_x or (need_weight and not product):
        needs = (need_x, need_weight and not product)
        x_gradient, by_convolution = _convolution_backward(x, weight, grad, 0, 1, needs)
    return x_gradient, _pointwise_weight_gradient(x, grad, weight) if product else by_convolution


def convolution_backward(x: Tensor, weight: Tensor, grad: Tensor, need_weight: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of `convolved`: that of ``x``, and that of ``weight`` where it is needed."""
    if is_depthwise(weight):
        x_gradient, gradient = _convolution_backward(x, weight, grad, 1, x.shape[1], (True, need_weight))
    else:
        x_gradient, gradient = pointwise_backward(x, weight, grad, True, need_weight)
    assert x_gradient is not None
    return x_gradient, gradient
