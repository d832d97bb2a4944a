"""Two cross-entropies and the T^2-scaled KL divergence of class logits: rows of classes and segmentation maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.case import FLOAT_BYTES, Case, Operands, Selection

TEMPERATURE = 4.0
# CIFAR-100; ImageNet with a large batch; a language model's vocabulary; Pascal VOC at a quarter of the resolution
SHAPES = ((128, 100), (4096, 1000), (512, 32000), (4, 21, 128, 128))
QUICK_SHAPES = SHAPES[:2]


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """T^2 KL(teacher || student) / rows as the original writes it; a row is one pixel of a map."""
    total = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, dim=1),
        F.softmax(teacher_logits.detach() / TEMPERATURE, dim=1),
        reduction="sum",
    )
    rows = student_logits.numel() // student_logits.size(1)
    return total / rows * TEMPERATURE**2


def original(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """CE + CE + T^2 KL."""
    loss = F.cross_entropy(student_logits, targets) + F.cross_entropy(teacher_logits, targets)
    return loss + divergence(student_logits, teacher_logits)


def ours(implementation: str) -> Callable[..., Tensor]:
    """The public function, forced to one implementation."""
    from frskd_fast import functional

    def cross_entropy_kd(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        parts = functional.cross_entropy_kd(
            student_logits, teacher_logits, targets, temperature=TEMPERATURE, impl=implementation
        )
        total: Tensor = parts.ce_student + parts.ce_teacher + parts.kd
        return total

    return cross_entropy_kd


def operands(shape: tuple[int, ...]) -> Operands:
    """Random logits, float32, classes on axis 1."""
    student, teacher, targets = inputs.random_logits(shape)
    return {"student_logits": student, "teacher_logits": teacher, "targets": targets}


def bytes_moved(shape: tuple[int, ...], dtype: str) -> int:
    """Both logits and the labels are read, both gradients written; whether in one pass or in two is up to the kernels."""
    labels = shape[0] * prod(shape[2:])  # int64
    return 4 * prod(shape) * FLOAT_BYTES[dtype] + 8 * labels


def cases(selection: Selection) -> list[Case]:
    """Shape x dtype; the layouts only differ for maps."""
    found = []
    for shape in QUICK_SHAPES if selection.quick else SHAPES:
        shape = (selection.batch or shape[0], *shape[1:])
        # a tiny call of the same rank
        tiny_shape = (2, 10, *(2 for _ in shape[2:]))
        for dtype in selection.dtypes:
            for layout in selection.layouts if len(shape) == 4 else ("rows",):
                found.append(
                    Case(
                        suite="logits",
                        shape="x".join(map(str, shape)),
                        dtype=dtype,
                        layout=layout,
                        backward=True,
                        bytes_moved=bytes_moved(shape, dtype),
                        operands=partial(operands, shape),
                        tiny=partial(operands, tiny_shape),
                        differentiated=("student_logits", "teacher_logits"),
                        original=original,
                        ours=ours,
                    )
                )
    return found
