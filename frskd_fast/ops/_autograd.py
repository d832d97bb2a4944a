"""Backward functions that cannot be differentiated again say so, instead of passing for constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """Passes a gradient on; differentiating it by one of the tensors that it depends on raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "The fused kernels have no second derivative, but a gradient of theirs was differentiated again; "
            "use impl='reference', which has one."
        )


class _Context:
    """A `ctx` whose saved tensors were read once: hooks such as those of activation checkpointing allow no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap a ``Function.backward`` so that a second derivative raises a sentence.

    PyTorch's decorator of this name does so only when the upstream gradient itself requires grad; a gradient penalty on a
    plain loss would silently lose its second-order term. Here a gradient depends, in the graph, on the upstream gradients and
    on the saved tensors, so whoever differentiates it by an input meets the refusal on the way. A function whose gradients
    depend on an input that it does not save saves `anchor(input)` for this.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        read = _Context(ctx)
        with torch.no_grad():
            gradients = backward(read, *grads)
        candidates = (*grads, *read.saved_tensors)
        sources = [source for source in candidates if isinstance(source, Tensor) and source.requires_grad]
        return tuple(_Refusal.apply(g, *sources) if isinstance(g, Tensor) else g for g in gradients)

    return wrapper


def anchor(tensor: Tensor) -> Tensor:
    """A tensor without elements that hangs on `tensor` in the graph and does not keep its storage alive."""
    return tensor[:0].clone()
