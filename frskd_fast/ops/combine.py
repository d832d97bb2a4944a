"""Operation ``combine``: the scalars of an objective from the unreduced losses of ``logits`` and ``attention``."""

from __future__ import annotations

from torch import Tensor

from frskd_fast.ops import _table


@_table.register("combine", "forward")
def combine(
    attention_losses: Tensor,
    logits_losses: Tensor,
    alpha: float,
    beta: float,
    has_targets: bool,
    split: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    """(total, ce_student, ce_teacher, kd, feature), and as scalars the total or the three of the logits."""
    return logits_losses.new_empty((5,)), [logits_losses.new_empty(()) for _ in range(3 if split else 1)]
