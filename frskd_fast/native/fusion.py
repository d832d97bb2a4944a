"""Raw weighted-fusion functions of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import empty_output

_ops = torch.ops.frskd_fast_native


def workspace_size(inputs: Sequence[Tensor]) -> int:
    """Elements that the partial sums of a device need: for each input at most 512 blocks' two sums per channel, and one number
    per block (csrc/cuda/fusion.cu has the plan)."""
    size = 0
    for x in inputs:
        batch, channels, height, width = x.shape
        size += 2 * channels * min(512, batch * height * width // 16 + 1) + max(4096, channels)
    return size


def _workspace(inputs: Sequence[Tensor]) -> Tensor | None:
    """Room for the partial sums of a device; the CPU kernels have their own."""
    first = inputs[0]
    if first.device.type != "cuda":
        return None
    return torch.empty(workspace_size(inputs), dtype=accumulate_dtype(first.dtype), device=first.device)


def batch_statistics(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    epsilons: Sequence[float],  # K, added to the variances
) -> list[Tensor]:
    """For each input (3, C): mean, 1 / sqrt(variance + epsilon), biased variance."""
    statistics = [torch.empty((3, x.shape[1]), dtype=accumulate_dtype(x.dtype), device=x.device) for x in inputs]
    _ops.fusion_statistics.default(inputs, epsilons, statistics, _workspace(inputs))
    return statistics


def forward(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],  # K x (>= 2, C), or empty where the input is not normalised
    gammas: Sequence[Tensor],  # K x (C,), or empty
    betas: Sequence[Tensor],  # K x (C,), or empty
    weight: Tensor,  # (K,)
    resamples: Sequence[int],  # K positions in RESAMPLES
    pre: int,  # position in ACTIVATIONS
    act: int,  # position in ACTIVATIONS
    weighting: int,  # position in WEIGHTINGS
    epsilon: float,  # added to the sum of the weights
    size: Sequence[int],  # (H, W) of the output
    depthwise: Tensor | None = None,  # (C, 1, 3, 3), of accumulate dtype; on a CPU, between maps in channels_last
) -> Tensor:
    """The fused map (N, C, H, W) in the inputs' dtype, or its depthwise convolution."""
    out = empty_output(inputs[0], size)
    _ops.fusion_forward.default(
        inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, out, depthwise
    )
    return out


def backward_sums(
    grad: Tensor,  # (N, C, H, W)
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,  # (K,)
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    depthwise: Tensor | None = None,  # (C, 1, 3, 3), of accumulate dtype; then `grad` is that of the convolution
    depthwise_gradient: Tensor | None = None,  # (C, 1, 3, 3), of accumulate dtype; written
    map_gradient: Tensor | None = None,  # (N, C, H, W) of the fused map, in channels_last; written
) -> tuple[list[Tensor], Tensor]:
    """For each normalised input (2, C): sum of dy and of dy * xhat; and the weights' gradient (K,)."""
    sums = [torch.empty((2, x.shape[1]) if s.numel() else 0, dtype=weight.dtype, device=weight.device)
            for x, s in zip(inputs, statistics, strict=True)]  # fmt: skip
    weight_gradient = torch.empty_like(weight)
    _ops.fusion_backward_sums.default(
        grad, inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, sums,
        weight_gradient, _workspace(inputs), depthwise, depthwise_gradient, map_gradient,
    )  # fmt: skip
    return sums, weight_gradient


def backward(
    grad: Tensor,  # (N, C, H, W)
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,  # (K,)
    sums: Sequence[Tensor],  # K x (2, C), or empty: not normalised, or by running statistics
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    need_inputs: Sequence[bool],  # K
    need_weight: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the needed inputs, in their order, dtype and memory format; the weights' gradient (K,) or empty."""
    positions = [position for position, needed in enumerate(need_inputs) if needed]
    gradients = [torch.empty_like(inputs[position]) for position in positions]
    weight_gradient = torch.empty_like(weight) if need_weight else None
    _ops.fusion_backward.default(
        grad, inputs, statistics, gammas, betas, weight, sums, resamples, pre, act, weighting, epsilon, positions,
        gradients, weight_gradient, _workspace(inputs) if need_weight else None,
    )  # fmt: skip
    return gradients, weight.new_empty(0) if weight_gradient is None else weight_gradient
