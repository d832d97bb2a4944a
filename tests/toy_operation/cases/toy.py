"""A suite of the benchmark: the toy operation on one size."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from toy import Pair, reference, toy

from bench.case import Case, Operands, Selection


def operands(count: int) -> Operands:
    """Random numbers, the same ones at each run."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, generator=generator) for name in ("student", "teacher")}


def original(student: Tensor, teacher: Tensor) -> Tensor:
    """3 * (student - teacher)."""
    return reference(Pair(student, teacher), 3.0)


def cases(selection: Selection) -> list[Case]:
    """One case."""
    count = 1000
    return [
        Case(
            suite="toy", shape=str(count), dtype="fp32", layout="rows", backward=True, bytes_moved=3 * 4 * count,
            operands=partial(operands, count), tiny=partial(operands, 5), differentiated=("student",),
            original=original, ours=lambda name: partial(toy, scale=3.0, impl=name),
        )
    ]  # fmt: skip
