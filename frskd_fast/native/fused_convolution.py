"""A fusion node and the depthwise 3x3 convolution behind it, in one pass over maps in channels_last; on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.native.fusion import empty_sums
from frskd_fast.reference.fusion import Node, Settings, empty_output

DEVICES = ("cpu",)

_ops = torch.ops.frskd_fast_native


def forward(
    node: Node,  # inputs with two channels or more, whose channels lie together
    settings: Settings,
    size: Sequence[int],  # (H, W) of the output
    depthwise: Tensor,  # (C, 1, 3, 3), of accumulate dtype, contiguous
) -> Tensor:
    """The convolution (N, C, H, W) of the fused map, which is not written."""
    out = empty_output(node.inputs[0], size)
    _ops.fused_convolution_forward.default(*node, *settings, depthwise, out)
    return out


def backward_sums(
    grad: Tensor,  # (N, C, H, W), of the convolution, channels lie together
    node: Node,
    settings: Settings,
    depthwise: Tensor,  # (C, 1, 3, 3)
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Sums and weights' gradient as in ``fusion``; the gradients of ``depthwise`` and, in channels_last, of the fused map.

    ``fusion.backward`` goes on from the gradient of the fused map as from any other.
    """
    sums, weight_gradient = empty_sums(node), torch.empty_like(node.weight)
    depthwise_gradient = torch.empty_like(depthwise)
    map_gradient = torch.empty_like(grad)
    _ops.fused_convolution_backward_sums.default(
        grad, *node, *settings, depthwise, sums, weight_gradient, depthwise_gradient, map_gradient
    )
    return sums, weight_gradient, depthwise_gradient, map_gradient
