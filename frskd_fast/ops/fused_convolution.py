"""Operation ``fused_convolution``: a fusion node and the depthwise 3x3 convolution behind it, in one pass.

Rows of the fused map then never leave the cache, and the map is not written, in either direction. Not every implementation
has raw functions of it, see `serves`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _table
from frskd_fast.ops.convolution import is_depthwise
from frskd_fast.reference.fusion import Node, Settings, empty_output


def empty_sums(node: Node) -> list[Tensor]:
    """(2, C) for each normalised input, else empty."""
    return [gamma.new_empty((2, *gamma.shape) if gamma.numel() else 0) for gamma in node.gammas]


# The raw functions of docs/contracts.md, with the implementation's name as the last argument.


@_table.register("fused_convolution")
def forward(node: Node, settings: Settings, size: Sequence[int], depthwise: Tensor, impl: str) -> Tensor:
    """The convolution (N, C, H, W) of the fused map."""
    return empty_output(node.inputs[0], size)


@_table.register("fused_convolution")
def backward_sums(
    grad: Tensor, node: Node, settings: Settings, depthwise: Tensor, impl: str
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Sums and weights' gradient as those of a node; the gradients of ``depthwise`` and of the fused map."""
    return empty_sums(node), torch.empty_like(node.weight), torch.empty_like(depthwise), torch.empty_like(grad)


def holds_whole_pixels(x: Tensor) -> bool:
    """Whether the channels of each pixel lie together, as in channels_last and in slices of its channels."""
    channels, height, width = x.shape[1:]
    # No generator: PyTorch 2.14 does not trace one whose comparisons need a guard.
    nested = (height == 1 or x.stride(2) >= channels) and (width == 1 or x.stride(3) >= channels)
    return not x.is_contiguous() and channels > 1 and x.stride(1) == 1 and nested


def with_whole_pixels(x: Tensor) -> Tensor:
    """``x``, or its copy in channels_last."""
    return x if holds_whole_pixels(x) else x.contiguous(memory_format=torch.channels_last)


def serves(node: Node, convolution: Tensor, impl: str) -> bool:
    """Whether implementation ``impl`` takes the node and its ``convolution`` in one pass."""
    offered = _dispatch.implements("fused_convolution", impl)
    return offered and is_depthwise(convolution) and all(map(holds_whole_pixels, node.inputs))


def prepared(convolution: Tensor, node: Node) -> Tensor:
    """The weight of the ``convolution`` as the raw functions read it."""
    return convolution.to(node.weight.dtype).contiguous()
