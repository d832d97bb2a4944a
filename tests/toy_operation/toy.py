"""A toy operation that lives outside the package: out = scale * (student - teacher)."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _table
from frskd_fast.ops._autograd import once_differentiable


class Pair(NamedTuple):
    """The tensors of one call."""

    student: Tensor  # (N,)
    teacher: Tensor  # (N,)


def reference(pair: Pair, scale: float) -> Tensor:
    """scale * (student - teacher), the specification."""
    return scale * (pair.student - pair.teacher)


@_table.register("toy")
def forward(pair: Pair, scale: float, impl: str) -> Tensor:
    """scale * (student - teacher), (N,)."""
    return torch.empty_like(pair.student)


class _Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, impl: str, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.scale = scale
        return forward(Pair(student, teacher), scale, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, ctx.scale * grad, -ctx.scale * grad


def toy(student: Tensor, teacher: Tensor, scale: float = 2.0, impl: str = "auto") -> Tensor:
    """scale * (student - teacher) by the implementation that the table chooses."""
    name = _dispatch.choose_for("toy", impl, student)
    if _dispatch.is_plain(name):
        _dispatch.record("toy", name)
        return reference(Pair(student, teacher), scale)
    out: Tensor = _Toy.apply(scale, name, student, teacher)
    return out


def provide() -> None:
    """Name the modules with the raw functions, which an operation of the package has in native/ and kernels/."""
    for name, module in (("cpu", "toy_native"), ("triton", "toy_kernels")):
        _dispatch.provide("toy", name, importlib.import_module(module))
