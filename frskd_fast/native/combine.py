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
) -> Tensor:
    """(total, ce_student, ce_teacher, kd, feature, inverse_valid)."""
    parts = torch.empty(6, dtype=logits_losses.dtype, device=logits_losses.device)
    _ops.combine.default(attention_losses, logits_losses, alpha, beta, has_targets, parts)
    return parts
