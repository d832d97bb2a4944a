"""The FRSKD objective from its unreduced parts, as a formula."""

from __future__ import annotations

from torch import Tensor


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(losses) / sum(weights), 0 when no row counts. ``losses`` already hold 0 where the weight is 0."""
    total = weights.sum()
    return losses.sum() / total.masked_fill(total == 0, 1.0)


def combine(ce_student: Tensor, ce_teacher: Tensor, kd: Tensor, feature: Tensor, alpha: float, beta: float) -> Tensor:
    """L = CE(student) + CE(teacher) + alpha * KD + beta * feature; four scalars -> scalar."""
    return ce_student + ce_teacher + alpha * kd + beta * feature
