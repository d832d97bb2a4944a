"""Raw weighted-fusion functions of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.native import needs_workspace
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import Node, Settings, empty_output

_ops = torch.ops.frskd_fast_native

# How csrc/cuda/fusion_domain.cuh splits the sums of one map: two numbers per channel of each block, and one number per block.
_MOST_BLOCKS = 512
_PIXELS_OF_A_BLOCK = 16
_LEAST_SINGLE_NUMBERS = 4096


def workspace_size(inputs: Sequence[Tensor]) -> int:
    """Elements that the partial sums of a device need."""
    size = 0
    for x in inputs:
        batch, channels, height, width = x.shape
        blocks = min(_MOST_BLOCKS, batch * height * width // _PIXELS_OF_A_BLOCK + 1)
        size += 2 * channels * blocks + max(_LEAST_SINGLE_NUMBERS, channels)
    return size


def _workspace(inputs: Sequence[Tensor]) -> Tensor | None:
    """Room for the partial sums of a device; the CPU kernels have their own."""
    first = inputs[0]
    if not needs_workspace(first):
        return None
    return torch.empty(workspace_size(inputs), dtype=accumulate_dtype(first.dtype), device=first.device)


def empty_sums(node: Node) -> list[Tensor]:
    """(2, C) for each normalised input, else empty."""
    return [
        torch.empty((2, x.shape[1]) if normalised else 0, dtype=node.weight.dtype, device=x.device)
        for x, normalised in zip(node.inputs, node.is_normalised(), strict=True)
    ]


def batch_statistics(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    epsilons: Sequence[float],  # K, added to the variances
) -> list[Tensor]:
    """For each input (3, C): mean, 1 / sqrt(variance + epsilon), biased variance."""
    statistics = [torch.empty((3, x.shape[1]), dtype=accumulate_dtype(x.dtype), device=x.device) for x in inputs]
    _ops.fusion_statistics.default(inputs, epsilons, statistics, _workspace(inputs))
    return statistics


def forward(
    node: Node,
    settings: Settings,
    size: Sequence[int],  # (H, W) of the output
) -> Tensor:
    """The fused map (N, C, H, W) in the inputs' dtype."""
    out = empty_output(node.inputs[0], size)
    _ops.fusion_forward.default(*node, *settings, out)
    return out


def backward_sums(
    grad: Tensor,  # (N, C, H, W)
    node: Node,
    settings: Settings,
) -> tuple[list[Tensor], Tensor]:
    """For each normalised input (2, C): sum of dy and of dy * xhat; and the weights' gradient (K,)."""
    sums, weight_gradient = empty_sums(node), torch.empty_like(node.weight)
    _ops.fusion_backward_sums.default(grad, *node, *settings, sums, weight_gradient, _workspace(node.inputs))
    return sums, weight_gradient


def backward(
    grad: Tensor,  # (N, C, H, W)
    node: Node,
    sums: Sequence[Tensor],  # K x (2, C), or empty: not normalised, or by running statistics
    settings: Settings,
    need_inputs: Sequence[bool],  # K
    need_weight: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the needed inputs, in their order, dtype and memory format; the weights' gradient (K,) or empty."""
    positions = [position for position, needed in enumerate(need_inputs) if needed]
    gradients = [torch.empty_like(node.inputs[position]) for position in positions]
    weight_gradient = torch.empty_like(node.weight) if need_weight else None
    workspace = _workspace(node.inputs) if need_weight else None
    _ops.fusion_backward.default(grad, *node, sums, *settings, positions, gradients, weight_gradient, workspace)
    return gradients, node.weight.new_empty(0) if weight_gradient is None else weight_gradient
