"""Operation ``combine``: the scalars of an objective from the unreduced losses of ``logits`` and ``attention``."""

from __future__ import annotations

from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _table


def _combine(
    attention_losses: Tensor,
    logits_losses: Tensor,
    alpha: float,
    beta: float,
    has_targets: bool,
    split: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    """(total, ce_student, ce_teacher, kd, feature), and as scalars the total or the three of the logits."""
    parts, scalars = _dispatch.raw("combine", impl).forward(
        attention_losses, logits_losses, alpha, beta, has_targets, split
    )
    return parts, scalars


def _fake_combine(
    attention_losses: Tensor,
    logits_losses: Tensor,
    alpha: float,
    beta: float,
    has_targets: bool,
    split: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    return logits_losses.new_empty((5,)), [logits_losses.new_empty(()) for _ in range(3 if split else 1)]


combine = _table.register("combine", _combine, _fake_combine, name="combine")
