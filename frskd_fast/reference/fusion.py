"""Weighted fusion of feature maps (one node of a BiFPN), as a formula, with each input's BatchNorm folded in.

out = sum_i w^_i * pre( resample_i( normalise_i(x_i) ) )

Ji et al., CVPR 2021 (arXiv 2103.08273), section 3.1; Tan et al., "EfficientDet", CVPR 2020, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

# The raw functions of all implementations take the position of a name in these tuples.
RESAMPLES = ("none", "up", "pool")
ACTIVATIONS = ("none", "relu", "silu")
WEIGHTINGS = ("sum", "relu", "softmax")


class Node(NamedTuple):
    """The tensors of one node. An input that is not normalised has empty statistics, gammas and betas (numel 0)."""

    inputs: Sequence[Tensor]  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor]  # K x (>= 2, C): mean, 1 / sqrt(variance + epsilon)
    gammas: Sequence[Tensor]  # K x (C,)
    betas: Sequence[Tensor]  # K x (C,)
    weight: Tensor  # (K,), raw

    def is_normalised(self) -> list[bool]:
        """For each input, whether it has statistics."""
        return [statistics.numel() > 0 for statistics in self.statistics]


class Settings(NamedTuple):
    """The numbers of one node; all plain Python, so that a traced graph holds them as constants."""

    resamples: Sequence[int]  # K positions in RESAMPLES
    pre: int  # position in ACTIVATIONS
    weighting: int  # position in WEIGHTINGS
    epsilon: float  # added to the sum of the weights


def empty_output(first: Tensor, size: Sequence[int]) -> Tensor:
    """An empty (N, C, *size) in the dtype of ``first``, channels_last where its channels (or a slice of them) lie together."""
    channels_last = not first.is_contiguous() and first.stride(1) == 1 and first.shape[1] > 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (first.shape[0], first.shape[1], size[0], size[1])
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format)


def normalise_weight(weight: Tensor, weighting: str, epsilon: float) -> Tensor:
    """w^ (K,) from w (K,): relu(w) / (sum relu(w) + epsilon), softmax(w), or ones for "sum"; in the accumulate dtype.

    In half precision an epsilon of 1e-6 would vanish beside the sum.
    """
    weight = weight.to(accumulate_dtype(weight.dtype))
    if weighting == "sum":
        return torch.ones_like(weight)
    if weighting == "softmax":
        return torch.softmax(weight, 0)
    positive = F.relu(weight)
    return positive / (positive.sum() + epsilon)


def pooled_size(size: Sequence[int]) -> tuple[int, ...]:
    """Sizes after same-max-pooling: halved, rounded up."""
    return tuple((side + 1) // 2 for side in size)


def same_max_pool(x: Tensor) -> Tensor:
    """Maximum over 3x3 windows of stride 2 of the zero-padded map; an odd size is padded on both sides, an even at its end."""
    top, left = x.shape[2] % 2, x.shape[3] % 2
    return F.max_pool2d(F.pad(x, (left, 1, top, 1)), 3, stride=2)


def activate(x: Tensor, name: str) -> Tensor:
    """max(x, 0), x * sigmoid(x), or x itself."""
    return F.relu(x) if name == "relu" else F.silu(x) if name == "silu" else x


def resampled(x: Tensor, resample: str, size: Sequence[int]) -> Tensor:
    """``x`` at ``size``: as it is, by nearest neighbour, or by same-max-pooling."""
    if resample == "up":
        return F.interpolate(x, size=tuple(size), mode="nearest")
    return same_max_pool(x) if resample == "pool" else x


def batch_statistics(x: Tensor, epsilon: float) -> Tensor:
    """(3, C): mean, 1 / sqrt(variance + epsilon) and the biased variance over batch and pixels."""
    variance, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
    return torch.stack([mean, torch.rsqrt(variance + epsilon), variance])


def normalised(x: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta for each channel."""
    mean, inverse_deviation = (row.view(1, -1, 1, 1) for row in statistics[:2].unbind(0))
    return (x - mean) * (inverse_deviation * gamma.view(1, -1, 1, 1)) + beta.view(1, -1, 1, 1)


def fuse(node: Node, settings: Settings, size: Sequence[int]) -> Tensor:
    """sum_i w^_i * pre( resample_i( normalise_i(x_i) ) ) in the accumulate dtype, rounded once: (N, C, *size)."""
    dtype = accumulate_dtype(node.inputs[0].dtype)
    weighting, pre = WEIGHTINGS[settings.weighting], ACTIVATIONS[settings.pre]
    weight = normalise_weight(node.weight, weighting, settings.epsilon)
    total: Tensor | None = None
    for position, (x, is_normalised) in enumerate(zip(node.inputs, node.is_normalised(), strict=True)):
        value = x.to(dtype)
        if is_normalised:
            value = normalised(value, node.statistics[position], node.gammas[position], node.betas[position])
        resample = RESAMPLES[settings.resamples[position]]
        term = weight[position] * activate(resampled(value, resample, size), pre)
        total = term if total is None else total + term
    assert total is not None
    return total.to(node.inputs[0].dtype)
