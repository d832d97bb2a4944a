"""Attention transfer, as a formula (FRSKD, CVPR 2021, arXiv 2103.08273; Zagoruyko and Komodakis, ICLR 2017).

a = mean_c |f|^p, q = a / max(||a||_2, 1e-12) per sample, loss[l, n] = mean_hw (q_student - q_teacher)^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

NORM_FLOOR = 1e-12


def attention_map(feature: Tensor, exponent: float = 2.0) -> Tensor:
    """q = a / max(||a||_2, 1e-12) with a = mean_c |f|^p; feature (N, C, H, W) -> map (N, H*W)."""
    values = feature.to(accumulate_dtype(feature.dtype))
    powers = values * values if exponent == 2.0 else values.abs().pow(exponent)
    activity = powers.mean(1).flatten(1)
    # The squares of a float32 map can pass the float32 range although the map itself does not.
    norm = torch.linalg.vector_norm(activity, dim=1, keepdim=True, dtype=torch.float64)
    divisor: Tensor = norm.to(activity.dtype).clamp_min(NORM_FLOOR)
    return activity / divisor


def attention_transfer(students: Sequence[Tensor], teachers: Sequence[Tensor], exponent: float = 2.0) -> Tensor:
    """mean_hw (q_student - q_teacher)^2 for each level and sample; lists of L (N, C, H, W) -> (L, N)."""
    rows = [
        (attention_map(student, exponent) - attention_map(teacher, exponent)).square().mean(1)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return torch.stack(rows)


def upstream_scale(weight: float, mean_over_batch: bool, batch: int) -> float:
    """What the upstream gradients are multiplied by: ``weight``, ``/ N`` where the loss is a mean over the batch."""
    return weight / max(batch, 1) if mean_over_batch else weight
