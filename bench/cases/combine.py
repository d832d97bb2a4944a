"""The FRSKD objective from unreduced losses: two cross-entropies, a divergence and the attention term in one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import inputs
from bench.case import FLOAT_BYTES, Case, Operands, Selection

ALPHA, BETA = 2.0, 100.0
# Beside the four levels of 128 samples: the rows of logits of a step on images of one class each are the samples. This is
# the number of pixels of segmentation maps (4, 21, 128, 128).
DENSE_ROWS = 65_536


def original(attention_losses: Tensor, logits_losses: Tensor) -> Tensor:
    """CE + CE + alpha * KD + beta * sum_l AT_l, term by term; rows of `logits_losses`: CE, CE, KD, weight in a mean."""
    weights = logits_losses[3].sum()
    ce_student = logits_losses[0].sum() / weights
    ce_teacher = logits_losses[1].sum() / weights
    return ce_student + ce_teacher + ALPHA * logits_losses[2].mean() + BETA * attention_losses.mean(1).sum()


def chosen(requested: str, tensor: Tensor) -> tuple[str, bool]:
    """The implementation that is asked for or picked, and whether it is the plain one; `--base` may name a commit without
    the table of operations."""
    from frskd_fast import _dispatch

    if hasattr(_dispatch, "is_plain"):
        name = _dispatch.choose_for("combine", requested, tensor)
        return name, _dispatch.is_plain(name)
    name = _dispatch.choose(requested, tensor.device.type, tensor.dtype)
    return name, name == "reference"


def ours(implementation: str) -> Callable[..., Tensor]:
    """The raw function of one implementation; no public function does this step alone."""
    from frskd_fast import _dispatch

    def combine(attention_losses: Tensor, logits_losses: Tensor) -> Tensor:
        name, plain = chosen(implementation, logits_losses)
        _dispatch.record("combine", name)
        if plain:
            return original(attention_losses, logits_losses)
        _, (total,) = _dispatch.raw("combine", name).forward(attention_losses, logits_losses, ALPHA, BETA, True, False)
        return total

    return combine


def operands(levels: int, batch: int, rows: int) -> Operands:
    """Losses of the size that training has; every tenth row is ignored."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    logits_losses = torch.rand(4, rows, generator=generator)
    logits_losses[3] = (torch.arange(rows) % 10 != 9).float()
    logits_losses[:2] *= logits_losses[3]
    return {
        "attention_losses": torch.rand(levels, batch, generator=generator) / BETA,
        "logits_losses": logits_losses,
    }


def cases(selection: Selection) -> list[Case]:
    """Numbers of rows; the losses are float32 whatever the features are, and backward has nothing to do here."""
    batch = selection.batch or 128
    return [
        Case(
            suite="combine",
            shape=f"{len(inputs.PYRAMID)}x{batch}, 4x{rows}",
            dtype="fp32",
            layout="rows",
            backward=False,
            bytes_moved=(len(inputs.PYRAMID) * batch + 4 * rows) * FLOAT_BYTES["fp32"],
            operands=partial(operands, len(inputs.PYRAMID), batch, rows),
            tiny=partial(operands, 2, 3, 10),
            differentiated=(),
            original=original,
            ours=ours,
        )
        for rows in ((batch,) if selection.quick else (batch, DENSE_ROWS))
        if "fp32" in selection.dtypes
    ]
