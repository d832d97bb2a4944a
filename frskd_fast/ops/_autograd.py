"""Backward functions that cannot be differentiated again say so, instead of passing for constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """Passes a gradient on; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "The fused kernels have no second derivative, but a gradient of theirs was differentiated again; "
            "use impl='reference', which has one."
        )


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap a ``Function.backward`` so that a second derivative raises a sentence.

    PyTorch's decorator of this name does so only when the upstream gradient itself requires grad; a gradient penalty on a
    plain loss would silently lose its second-order term.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        anchor = torch.zeros((), requires_grad=True)
        return tuple(_Refusal.apply(g, anchor) if isinstance(g, Tensor) else g for g in gradients)

    return wrapper
