"""Attention transfer over the four feature maps of cifarresnet18 against its self-teacher's, twice as wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.case import FLOAT_BYTES, Case, Operands, Selection


def attention(feature: Tensor) -> Tensor:
    """The original's attention map, operation by operation: (N, C, H, W) -> (N, H * W)."""
    return F.normalize(feature.pow(2).mean(1).view(feature.size(0), -1))


def original(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """sum_l mean (q_student - q_teacher)^2 as the original writes it."""
    terms = [
        (attention(student) - attention(teacher)).pow(2).mean()
        for student, teacher in zip(student_features, teacher_features, strict=True)
    ]
    return sum(terms[1:], terms[0])


def ours(implementation: str) -> Callable[..., Tensor]:
    """The public function, forced to one implementation."""
    from frskd_fast import functional

    def attention_transfer(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        return functional.attention_transfer(student_features, teacher_features, impl=implementation)

    return attention_transfer


def operands(batch: int, kind: str) -> Operands:
    """Features of student and teacher, float32 NCHW."""
    given = inputs.distillation_inputs(batch, kind)
    return {"student_features": given.student_features, "teacher_features": given.teacher_features}


def tiny() -> Operands:
    """The same call on a few numbers."""
    return {"student_features": inputs.tiny_pyramid(1), "teacher_features": inputs.tiny_pyramid(inputs.TEACHER_WIDTH)}


def student_elements(batch: int) -> int:
    """Elements of the student's feature maps; the teacher's are TEACHER_WIDTH times as many."""
    return batch * sum(channels * side * side for channels, side in inputs.PYRAMID)


def bytes_moved(batch: int, dtype: str, backward: bool) -> int:
    """Forward reads student and teacher once; backward reads the student once more and writes its gradient."""
    return student_elements(batch) * (1 + inputs.TEACHER_WIDTH + (2 if backward else 0)) * FLOAT_BYTES[dtype]


def cases(selection: Selection) -> list[Case]:
    """dtype x layout, forward and backward; then, in the first dtype asked for, forward alone."""
    batch = selection.batch or 128
    return [
        Case(
            suite="attention",
            shape=f"N={batch}",
            dtype=dtype,
            layout=layout,
            backward=backward,
            bytes_moved=bytes_moved(batch, dtype, backward),
            operands=partial(operands, batch, selection.input_kind),
            tiny=tiny,
            differentiated=("student_features",),
            original=original,
            ours=ours,
            weight=64.0,  # near FRSKD's beta of 100; a power of two does not round
        )
        for backward in ((True,) if selection.quick else (True, False))
        for dtype in (selection.dtypes if backward else selection.dtypes[:1])
        for layout in selection.layouts
    ]
