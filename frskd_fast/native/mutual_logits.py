"""Raw function of ``mutual_logits`` in the compiled library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import check_label_range
from frskd_fast.reference.mutual_logits import MutualSettings

DEVICES = ("cpu",)

_ops = torch.ops.frskd_fast_native


def forward(
    logits: Sequence[Tensor], targets: Tensor | None, weight: Tensor, settings: MutualSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms (2, S + 1) and its gradients (S + 1, N, K) (docs/contracts.md)."""
    first = logits[0]
    rows, classes = first.shape
    heads, dtype = len(logits), accumulate_dtype(first.dtype)
    loss = torch.empty((), dtype=dtype)
    terms = torch.empty((2, heads), dtype=dtype)
    gradients = torch.empty((heads, rows, classes), dtype=dtype)
    row_losses = torch.empty((2, heads, rows), dtype=dtype)
    _ops.mutual_logits_forward.default(logits, targets, weight, *settings, loss, terms, row_losses, gradients)
    if targets is not None and math.isnan(loss.item()):
        # The sign of a label that is no class: the kernel finds it where it reads the label anyway.
        check_label_range(targets, classes, settings.ignore_index, "targets")
    return loss, terms, gradients
