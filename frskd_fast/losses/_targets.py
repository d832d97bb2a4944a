"""Targets of mixup and cutmix as one tensor, for graphs that must not hold the mixing weight as a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frskd_fast.ops.logits import _is_mix as is_mix

__all__ = ["is_mix", "mixed_probabilities"]


def mixed_probabilities(
    targets: Sequence[Any], logits: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Probabilities t (N, K) whose cross-entropy is that of the two-label targets, ignored labels and smoothing included.

    With w_n = sum_k t_nk the weight of row n (below 1 where a label is ignored), the two-label mean divides by sum_n w_n
    and the mean over probabilities by N; the difference goes into t.
    """
    classes = logits.shape[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    positions = torch.arange(classes, device=logits.device)

    def one_hot(labels: Tensor) -> Tensor:
        # As everywhere on a device, where reading them would synchronise, labels that are no class give NaN.
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        return (labels.unsqueeze(1) == positions).to(dtype).masked_fill(wrong.unsqueeze(1), float("nan"))

    first, second, mix = targets
    probabilities: Tensor = mix * one_hot(first) + (1 - mix) * one_hot(second)
    weight = probabilities.sum(1, keepdim=True)
    total = weight.sum()
    scale = torch.where(total == 0, 0.0, logits.shape[0] / total)
    if label_smoothing < 1:
        smoothed = (scale * weight - 1) * (label_smoothing / (classes * (1 - label_smoothing)))
        probabilities = scale * probabilities + smoothed
    return probabilities.to(dtype)
