"""Feature distances of FitNet and of overhaul distillation, as formulas.

s is the student's adapted map before its last ReLU, t the teacher's map; levels are added up by the caller.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

# Where so little of a channel lies below zero, its mean there is replaced by three deviations.
NEGATIVE_SHARE_FLOOR = 0.001


def fitnet_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean over all N*C*H*W elements of (relu(s) - t)^2; two maps (N, C, H, W) -> scalar. An empty batch gives 0."""
    dtype = accumulate_dtype(student.dtype)
    difference = F.relu(student.to(dtype)) - teacher.to(dtype)
    return difference.square().sum() / max(difference.numel(), 1)


def overhaul_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """(1 / N) * sum (s - u)^2 [s > u or u > 0] with u = max(t, margin); maps (N, C, H, W), margin (1, C, 1, 1) -> scalar.

    An element that does not count contributes 0 unless it is NaN.
    """
    dtype = accumulate_dtype(student.dtype)
    target = torch.maximum(teacher.to(dtype), margin.to(dtype))
    difference = student.to(dtype) - target
    return torch.where(target > 0, difference, F.relu(difference)).square().sum() / max(student.shape[0], 1)


def overhaul_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] for x normal with mean b and deviation |g|: b - |g| exp(-(b/g)^2 / 2) / (sqrt(2 pi) Phi(-b / |g|)).

    Where Phi(-b / |g|), the share below zero, is at most 0.001 the margin is -3 |g|. A channel with g = 0 is the constant b:
    its margin is min(b, 0). `weight` g and `bias` b of the BatchNorm behind which x is found, both (C,) -> (C,).
    """
    deviation = weight.abs()
    # 0 / 0 is a constant channel at zero: any share below zero gives the margin 0.
    ratio = (bias / deviation).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    # erfc keeps its digits where the share is small; 1 - Phi would not.
    share = 0.5 * torch.special.erfc(ratio / math.sqrt(2.0))
    mean = bias - deviation * torch.exp(-0.5 * ratio.square()) / (math.sqrt(2.0 * math.pi) * share)
    return torch.where(share > NEGATIVE_SHARE_FLOOR, mean, -3.0 * deviation)
