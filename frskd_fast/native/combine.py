"""Raw reduction of the FRSKD objective in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.frskd_fast_native


def forward(
    attention_losses: Tensor,  # (L, N)
    logits_losses: Tensor,  # (4, R)
    alpha: float,
    beta: float,
    has_targets: bool,
    split: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(total, ce_student, ce_teacher, kd, feature), and the total or the three of the logits as scalars."""
    parts = torch.empty(5, dtype=logits_losses.dtype, device=logits_losses.device)
    scalars = [torch.empty((), dtype=parts.dtype, device=parts.device) for _ in range(3 if split else 1)]
    _ops.combine.default(attention_losses, logits_losses, alpha, beta, has_targets, parts, scalars)
    return parts, scalars
