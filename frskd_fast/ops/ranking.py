"""The T^2-scaled divergence over the rows whose correct column the teacher ranks best; operation `logits` and plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from frskd_fast.ops import _checks, logits
from frskd_fast.ops.labels import class_indices
from frskd_fast.reference.logits import check_label_range
from frskd_fast.reference.ranking import rank_of_labelled, row_weights


def kept_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_m weights[m] * rows[m]; (M,), (M,). A row of weight 0 may be infinite, but NaN in any row is seen in the mean."""
    left_out = (rows == math.inf).logical_and_(weights == 0)
    return rows.masked_fill(left_out, 0.0).dot(weights)


def ranked_mean(rows: Tensor, teacher_scores: Tensor, correct: Tensor, ratio: float) -> Tensor:
    """The mean of `rows` (N, ...) over those that are kept, given the scores (N, K, ...) that rank them."""
    ranks = rank_of_labelled(teacher_scores.detach().movedim(1, -1), correct)
    return kept_mean(rows.flatten(), row_weights(ranks.flatten(), ratio, rows.dtype))


def divergence(
    student_scores: Tensor, teacher_scores: Tensor, correct: Tensor | None, temperature: float, ratio: float, impl: str
) -> Tensor:
    """The divergence of scores (N, K, ...) over the kept of all rows; of checked arguments. Nothing is ranked at ratio 1."""
    reduction = "batchmean" if ratio == 1.0 else "none"
    kd = logits.logit_losses(student_scores, teacher_scores, None, temperature, 0.0, -100, reduction, True, impl)[2]
    if ratio != 1.0:
        assert correct is not None
        kd = ranked_mean(kd, teacher_scores, correct, ratio)
    value: Tensor = kd
    return value


def ranked_kd_loss(
    student_scores: Any, teacher_scores: Any, correct: Any, temperature: float, ratio: float, impl: str
) -> Tensor:
    """Checks, then `divergence`; scores (M, K), correct (M,)."""
    for scores, name in ((student_scores, "student_scores"), (teacher_scores, "teacher_scores")):
        _checks.floating_tensor(scores, name)
        if scores.dim() != 2 or scores.shape != student_scores.shape or scores.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)}, but (M, K), the same for student and teacher, was wanted."
            )
    _checks.same(student_scores, "student_scores", teacher_scores, "teacher_scores")
    ratio = _checks.unit_interval(ratio, "ratio")
    correct = class_indices(correct, student_scores, "correct", "column indices (M,), int64,")
    check_label_range(correct, student_scores.shape[1], -100, "correct")
    return divergence(student_scores, teacher_scores, correct, temperature, ratio, impl)
