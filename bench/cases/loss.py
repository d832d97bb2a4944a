"""The whole FRSKD objective: two cross-entropies, alpha * T^2 KL, beta * attention transfer over four levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.case import Case, Operands, Selection
from bench.cases import attention, logits

ORDER = 1
ALPHA, BETA = 2.0, 100.0


def original(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    targets: Tensor,
) -> Tensor:
    """The objective as the original writes it, term by term."""
    loss = F.cross_entropy(student_logits, targets) + F.cross_entropy(teacher_logits, targets)
    distillation = logits.divergence(student_logits, teacher_logits)
    return loss + ALPHA * distillation + BETA * attention.original(student_features, teacher_features)


def ours(implementation: str) -> Callable[..., Tensor]:
    """The public loss module, forced to one implementation."""
    from frskd_fast.losses import FRSKDLoss

    criterion = FRSKDLoss(ALPHA, BETA, logits.TEMPERATURE, impl=implementation)

    def frskd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        targets: Tensor,
    ) -> Tensor:
        loss: Tensor = criterion(student_logits, teacher_logits, student_features, teacher_features, targets)
        return loss

    return frskd_loss


def operands(batch: int, kind: str) -> Operands:
    """Logits and features of student and teacher with labels, float32 NCHW."""
    given = inputs.distillation_inputs(batch, kind)
    return {
        "student_logits": given.student_logits,
        "teacher_logits": given.teacher_logits,
        "student_features": given.student_features,
        "teacher_features": given.teacher_features,
        "targets": given.targets,
    }


def tiny() -> Operands:
    """The same call on a few numbers."""
    student, teacher, targets = inputs.random_logits((2, 10))
    return {"student_logits": student, "teacher_logits": teacher, **attention.tiny(), "targets": targets}


def bytes_moved(batch: int, dtype: str) -> int:
    """Those of the attention term and of the logits."""
    logit_bytes = logits.bytes_moved((batch, inputs.CLASSES), dtype)
    return attention.bytes_moved(batch, dtype, backward=True) + logit_bytes


def cases(selection: Selection) -> list[Case]:
    """dtype x layout, forward and backward."""
    batch = selection.batch or 128
    return [
        Case(
            suite="loss",
            shape=f"N={batch} K={inputs.CLASSES}",
            dtype=dtype,
            layout=layout,
            backward=True,
            bytes_moved=bytes_moved(batch, dtype),
            operands=partial(operands, batch, selection.input_kind),
            tiny=tiny,
            differentiated=("student_logits", "teacher_logits", "student_features"),
            original=original,
            ours=ours,
            operations=("attention", "logits", "combine"),
        )
        for dtype in selection.dtypes
        for layout in selection.layouts
    ]
