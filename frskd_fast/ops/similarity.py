"""Cosines between rows of vectors, as inner products that are scaled by inverse lengths. Plain PyTorch on every device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import kept
from frskd_fast.reference import similarity as reference
from frskd_fast.reference.dtypes import accumulate_dtype

EPSILON = 1e-8  # of torch.nn.functional.cosine_similarity


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast would take inner products in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _Cosines(torch.autograd.Function):
    """c_ij = a_i b_j <x_i, y_j> with a_i = 1 / max(||x_i||, eps), b_j likewise; y is every `step`-th row of x where it is None.

    With G = dL/dc and Q_ij = a_i b_j G_ij, dL/dx_i = sum_j Q_ij y_j + (da_i/dx_i) sum_j b_j G_ij <x_i, y_j>, and da_i/dx_i is
    -a_i^3 x_i where ||x_i|| >= eps, else 0. So dL/dx = Q y - diag(s) x with s_i = a_i^2 sum_j G_ij c_ij, and dL/dy alike.
    Besides x and y, only what has the size of c is kept.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, step: int, x: Tensor, y: Tensor | None) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        wide = x.to(dtype)
        others = wide[::step] if y is None else y.to(dtype)
        lengths = torch.linalg.vector_norm(wide, dim=1)
        other_lengths = lengths[::step] if y is None else torch.linalg.vector_norm(others, dim=1)
        inverse = lengths.clamp_min(eps).reciprocal_()
        other_inverse = inverse[::step] if y is None else other_lengths.clamp_min(eps).reciprocal_()
        cosines = torch.mm(wide, others.t()).mul_(inverse.unsqueeze(1)).mul_(other_inverse)
        ctx.save_for_backward(x, y, cosines, lengths, other_lengths, inverse, other_inverse)
        ctx.settings = eps, step
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        eps, step = ctx.settings
        x, y, cosines, lengths, other_lengths, inverse, other_inverse = ctx.saved_tensors
        (grad,) = grads
        wide = x.to(cosines.dtype)
        others = wide[::step] if y is None else y.to(cosines.dtype)
        products = grad * cosines
        shrinking = (products.sum(1) * inverse.square()).masked_fill_(lengths < eps, 0.0)
        other_shrinking = (products.sum(0) * other_inverse.square()).masked_fill_(other_lengths < eps, 0.0)
        scaled = (grad * inverse.unsqueeze(1)).mul_(other_inverse)
        with _without_autocast(x.device.type):
            if y is None:
                shrinking[::step] += other_shrinking
                gradient = (wide * shrinking.neg_().unsqueeze(1)).addmm_(scaled, others)
                gradient[::step].addmm_(scaled.t(), wide)
                return None, None, gradient.to(x.dtype), None
            gradient = other_gradient = None
            if ctx.needs_input_grad[2]:
                gradient = (wide * shrinking.neg_().unsqueeze(1)).addmm_(scaled, others).to(x.dtype)
            if ctx.needs_input_grad[3]:
                other_gradient = (others * other_shrinking.neg_().unsqueeze(1)).addmm_(scaled.t(), wide).to(y.dtype)
            return None, None, gradient, other_gradient


def pairwise_cosine(x: Any, y: Any, eps: float, impl: str) -> Tensor:
    """Checks, choice of implementation and autograd; (M, D), (N, D) -> (M, N)."""
    for vectors, name in ((x, "x"), (y, "y")):
        _checked_vectors(vectors, name)
    _checks.same(x, "x", y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, but x has {tuple(x.shape)} and vectors of equal length were wanted."
        )
    eps = _checks.positive_number(eps, "eps")
    with _without_autocast(x.device.type):
        if _dispatch.is_plain(_dispatch.choose_for("similarity", impl, x)):
            return reference.pairwise_cosine(x, y, eps)
        cosines: Tensor = _Cosines.apply(eps, 1, kept(x), kept(y))
        return cosines


def cosines_of_views(projections: Any, name: str, impl: str) -> Tensor:
    """Cosines of all rows with the upright ones; (4N, D) in the order of `rotate4` -> (4N, N)."""
    _checked_vectors(projections, name)
    rows = projections.shape[0]
    if rows == 0 or rows % 4 != 0:
        raise ValueError(
            f"{name} has {rows} rows, but four for each image were wanted, in the order of mixing.rotate4."
        )
    with _without_autocast(projections.device.type):
        if _dispatch.is_plain(_dispatch.choose_for("similarity", impl, projections)):
            return reference.pairwise_cosine(projections, projections[::4], EPSILON)
        cosines: Tensor = _Cosines.apply(EPSILON, 4, kept(projections), None)
        return cosines


def _checked_vectors(value: Any, name: str) -> None:
    vectors = _checks.floating_tensor(value, name)
    if vectors.dim() != 2 or vectors.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(vectors.shape)}, but rows of at least one number were wanted, (rows, D)."
        )
