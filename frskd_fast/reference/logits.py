"""Losses on rows of class logits, as formulas: cross-entropy and the T^2-scaled Kullback-Leibler divergence.

The class axis is 1; a "row" is one (n, y, x). Everything is unreduced. Here are also the groups of arguments that the raw
functions of every implementation take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype


class Settings(NamedTuple):
    """The numbers of one call; all plain Python, so that a traced graph holds them as constants."""

    mix: float  # weight of the first labels of a mix
    label_smoothing: float
    ignore_index: int
    temperature: float


class Heads(NamedTuple):
    """The tensors of one call, a list for each kind; R rows in all, those of one head behind those of the other."""

    students: Sequence[Tensor]  # heads x (N, K[, H[, W]])
    teachers: Sequence[Tensor]  # the same shapes, or empty
    targets: Sequence[Tensor]  # heads x (N[, H[, W]]) int64, or probabilities of the logits' shape, or empty
    targets_b: Sequence[Tensor]  # second labels of a mix, or empty


class Saved(NamedTuple):
    """What the forward pass returns and the backward pass is given."""

    losses: Tensor  # (4, R): ce_student, ce_teacher, kd, and the row's weight in a mean
    statistics: Tensor  # (the implementation's STATISTICS, R)
    inverse_valid: Tensor  # (heads,) 1 / sum of the weights, 0 where that is 0


class Upstream(NamedTuple):
    """d / d losses: row r of head h has grads[j][h * head_stride + r * row_stride] * weights[j].

    With ``mean`` that is the gradient of the head's means: over its kept rows (cross-entropies) and over all (divergence).
    """

    grads: Sequence[Tensor]  # three of one axis or none: ce_student, ce_teacher, kd
    head_stride: int  # elements
    row_stride: int  # elements
    weights: Sequence[float]  # three, 0 where the term is absent
    mean: bool


class Wanted(NamedTuple):
    """Which gradients a backward pass returns: the students', then the teachers'."""

    student: bool
    teacher: bool
    kd_to_teacher: bool  # whether the divergence reaches the teacher


def row_count(logits: Tensor) -> int:
    """N * H * W of (N, K[, H[, W]])."""
    rows = logits.shape[0]
    for size in logits.shape[2:]:
        rows = rows * size
    return rows


def head_scales(upstream: Upstream, students: Sequence[Tensor]) -> list[float]:
    """The factor of each of the three gradients in each head, (3 * heads,), but for the heads' ``inverse_valid``."""
    ce_student, ce_teacher, kd = upstream.weights
    scales: list[float] = []
    for student in students:
        scales += [ce_student, ce_teacher, kd / max(row_count(student), 1) if upstream.mean else kd]
    return scales


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


def check_label_range(labels: Tensor, classes: int, ignore_index: int, name: str) -> None:
    """Raise for a label outside [0, K). On a device finding one would synchronise, so there its row is NaN instead."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if labels.numel() == 0:
        return
    lowest, highest = labels.aminmax()
    if 0 <= int(lowest) and int(highest) < classes:
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} holds the label {int(labels[wrong][0])}, but with {classes} classes a label from 0 to {classes - 1} "
            f"(or ignore_index={ignore_index}) was wanted."
        )
