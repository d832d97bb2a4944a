"""Losses on rows of class logits, as formulas: cross-entropy and the T^2-scaled Kullback-Leibler divergence.

The class axis is 1; a "row" is one (n, y, x). Everything is unreduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype


def tempered_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * sum_k p_t (log p_t - log p_s), p = softmax(z / T); (N, K, ...) -> (N, ...). p_t = 0 contributes 0."""
    dtype = accumulate_dtype(student_logits.dtype)
    log_student = torch.log_softmax(student_logits.to(dtype) / temperature, 1)
    log_teacher = torch.log_softmax(teacher_logits.to(dtype) / temperature, 1)
    probability = log_teacher.exp()
    log_ratio = (log_teacher - log_student).masked_fill(probability == 0, 0.0)
    return temperature**2 * (probability * log_ratio).sum(1)


def index_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """CE = lse(z) - (1 - s) z_y - s mean_k z_k for each row, and whether the row counts (1) or is ignored (0).

    A label outside [0, K) that is not ignored gives NaN: on a device it must not end the process.
    """
    log_probability = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), 1)
    kept = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[1])
    picked = log_probability.gather(1, labels.where(known, 0).unsqueeze(1)).squeeze(1)
    picked = picked.masked_fill(~known & kept, float("nan"))
    loss = -(1.0 - label_smoothing) * picked
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * log_probability.mean(1)
    return loss.masked_fill(~kept, 0.0), kept.to(loss.dtype)


def probability_cross_entropy(logits: Tensor, probabilities: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """CE = -sum_k t_k log softmax(z)_k with t = (1 - s) * probabilities + s / K; t_k = 0 contributes 0."""
    log_probability = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), 1)
    label = probabilities.to(log_probability.dtype)
    if label_smoothing > 0.0:
        label = (1.0 - label_smoothing) * label + label_smoothing / logits.shape[1]
    return -(label * log_probability.masked_fill(label == 0, 0.0)).sum(1)
