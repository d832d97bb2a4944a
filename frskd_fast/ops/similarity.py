"""Cosines between rows of vectors, as scaled inner products in plain PyTorch, and the divergence of two networks' cosines."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, logits, ranking
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import kept
from frskd_fast.reference import similarity as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted
from frskd_fast.reference.ranking import rank_of, row_weights

EPSILON = 1e-8  # of torch.nn.functional.cosine_similarity


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast would take inner products in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _Lengths(NamedTuple):
    """The lengths of vectors, and a_i = 1 / max(||x_i||, eps); (M,) each."""

    lengths: Tensor
    inverse: Tensor


def _lengths(vectors: Tensor, eps: float) -> _Lengths:
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    return _Lengths(lengths, lengths.clamp_min(eps).reciprocal_())


def _scaled(vectors: Tensor, lengths: _Lengths) -> Tensor:
    """u_i = a_i x_i. Before the products, which of large vectors are infinite, and of small ones 0."""
    return vectors.to(lengths.inverse.dtype) * lengths.inverse.unsqueeze(1)


def _shrinking(products: Tensor, lengths: _Lengths, eps: float) -> Tensor:
    """s_i (M, 1), of sum_j G_ij c_ij (M,), which is overwritten."""
    return products.masked_fill_(lengths.lengths < eps, 0.0).unsqueeze(1)


class _Cosines(torch.autograd.Function):
    """c_ij = <u_i, v_j> with u_i = a_i x_i, a_i = 1 / max(||x_i||, eps), and v_j likewise of y_j.

    With G = dL/dc, dL/dx_i = a_i sum_j G_ij v_j + (da_i/dx_i) sum_j G_ij <x_i, v_j>, and da_i/dx_i is -a_i^3 x_i where
    ||x_i|| >= eps, else 0. So dL/dx_i = a_i (sum_j G_ij v_j - s_i u_i) with s_i = sum_j G_ij c_ij or 0, and dL/dy alike.
    Besides x and y, only what has the size of c is kept.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, y: Tensor) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        wide_x, wide_y = x.to(dtype), y.to(dtype)
        lengths_x, lengths_y = _lengths(wide_x, eps), _lengths(wide_y, eps)
        cosines = torch.mm(_scaled(wide_x, lengths_x), _scaled(wide_y, lengths_y).t())
        ctx.save_for_backward(x, y, cosines, *lengths_x, *lengths_y)
        ctx.eps = eps
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, y, cosines, *lengths = ctx.saved_tensors
        lengths_x, lengths_y = _Lengths(*lengths[:2]), _Lengths(*lengths[2:])
        scaled_x, scaled_y = _scaled(x, lengths_x), _scaled(y, lengths_y)
        grad, products = grads[0], grads[0] * cosines
        with _without_autocast(x.device.type):
            gradient_x = gradient_y = None
            if ctx.needs_input_grad[1]:
                shrinking = _shrinking(products.sum(1), lengths_x, ctx.eps)
                gradient_x = (scaled_x * shrinking).addmm_(grad, scaled_y, beta=-1.0)
                gradient_x = gradient_x.mul_(lengths_x.inverse.unsqueeze(1)).to(x.dtype)
            if ctx.needs_input_grad[2]:
                shrinking = _shrinking(products.sum(0), lengths_y, ctx.eps)
                gradient_y = (scaled_y * shrinking).addmm_(grad.t(), scaled_x, beta=-1.0)
                gradient_y = gradient_y.mul_(lengths_y.inverse.unsqueeze(1)).to(y.dtype)
        return None, gradient_x, gradient_y


def _view_cosines(x: Tensor) -> tuple[Tensor, _Lengths]:
    """Cosines of x (4N, D) with its upright rows x[::4], (4N, N)."""
    wide = x.to(accumulate_dtype(x.dtype))
    lengths = _lengths(wide, EPSILON)
    scaled = _scaled(wide, lengths)
    return torch.mm(scaled, scaled[::4].t()), lengths


def _view_cosines_backward(grad: Tensor, x: Tensor, cosines: Tensor, lengths: _Lengths) -> Tensor:
    """dL/dx, that of `_Cosines` for both sides: what the upright rows get as such is added where it belongs."""
    scaled = _scaled(x, lengths)
    products = grad * cosines
    shrinking = products.sum(1)
    shrinking[::4] += products.sum(0)
    with _without_autocast(x.device.type):
        gradient = (scaled * _shrinking(shrinking, lengths, EPSILON)).addmm_(grad, scaled[::4], beta=-1.0)
        gradient[::4].addmm_(grad.t(), scaled)
    return gradient.mul_(lengths.inverse.unsqueeze(1)).to(x.dtype)


class _CosinesOfViews(torch.autograd.Function):
    """`_view_cosines`, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        cosines, lengths = _view_cosines(x)
        ctx.save_for_backward(x, cosines, *lengths)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, cosines, *lengths = ctx.saved_tensors
        return (_view_cosines_backward(grads[0], x, cosines, _Lengths(*lengths)),)


def _view_weights(teacher_cosines: Tensor, ratio: float) -> Tensor:
    """What each row of (4N, N) counts in the mean over the kept rotated rows; (4N,), 0 for upright rows."""
    images = teacher_cosines.shape[1]
    if ratio == 1.0:
        weights = teacher_cosines.new_full((images, 4), 1.0 / (3 * images))
        weights[:, 0] = 0.0
        return weights.flatten()
    rotated = teacher_cosines.unflatten(0, (images, 4))[:, 1:]
    own = torch.arange(images, device=teacher_cosines.device).unsqueeze(1)
    kept_rows = row_weights(rank_of(rotated, own).flatten(), ratio, teacher_cosines.dtype)
    return F.pad(kept_rows.unflatten(0, (images, 3)), (1, 0)).flatten()


class _ViewDivergence(torch.autograd.Function):
    """T^2 * mean over the kept rotated rows of KL(teacher's cosines || student's); upright rows go along with weight 0."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, ratio: float, impl: str, student: Tensor, teacher: Tensor) -> Tensor:
        cosines, lengths = _view_cosines(student)
        teacher_cosines, _ = _view_cosines(teacher)
        weights = _view_weights(teacher_cosines, ratio)
        saved = logits.forward(Heads([cosines], [teacher_cosines], [], []), settings, impl)
        ctx.save_for_backward(student, cosines, *lengths, teacher_cosines, weights, *saved)
        ctx.settings = settings, impl
        return ranking.kept_mean(saved[0][2], weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        settings, impl = ctx.settings
        student, cosines, norms, inverse, teacher_cosines, weights, *saved = ctx.saved_tensors
        upstream = Upstream([grads[0] * weights] * 3, 0, 1, [0.0, 0.0, 1.0], False)
        heads = Heads([cosines], [teacher_cosines], [], [])
        (grad,) = logits.backward(upstream, heads, settings, Saved(*saved), Wanted(True, False, False), impl)
        gradient = _view_cosines_backward(grad, student, cosines, _Lengths(norms, inverse))
        return None, None, None, gradient, None


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
        cosines: Tensor = _Cosines.apply(eps, kept(x), kept(y))
        return cosines


def cosines_of_views(projections: Any, name: str, impl: str) -> Tensor:
    """Cosines of the 3N rotated rows with the N upright ones; (4N, D) in the order of `rotate4` -> (N, N, 3).

    On axis 1 are the upright rows, on the last the rotations.
    """
    _checked_views(projections, name)
    with _without_autocast(projections.device.type):
        if _dispatch.is_plain(_dispatch.choose_for("similarity", impl, projections)):
            cosines = reference.pairwise_cosine(projections, projections[::4], EPSILON)
        else:
            cosines = _CosinesOfViews.apply(kept(projections))
    by_image: Tensor = cosines.unflatten(0, (cosines.shape[1], 4))
    return by_image[:, 1:].transpose(1, 2)


def view_divergence(student: Any, teacher: Any, temperature: float, ratio: float, impl: str) -> Tensor:
    """`ranked_kd_loss` of the rotated rows' cosines with the upright ones, of projections (4N, D) and (4N, E)."""
    _checked_views(student, "student_projections")
    _checked_views(teacher, "teacher_projections")
    teacher = teacher.detach()
    name = _dispatch.choose_for("logits", impl, student)
    if _dispatch.is_plain(name):
        cosines, teacher_cosines = (cosines_of_views(side, "projections", name) for side in (student, teacher))
        own = torch.arange(cosines.shape[0], device=cosines.device).unsqueeze(1)
        return ranking.divergence(cosines, teacher_cosines, own, temperature, ratio, name)
    with _without_autocast(student.device.type):
        divergence: Tensor = _ViewDivergence.apply(
            Settings(1.0, 0.0, -100, temperature), ratio, name, kept(student), teacher
        )
        return divergence


def _checked_views(value: Any, name: str) -> None:
    _checked_vectors(value, name)
    rows = value.shape[0]
    if rows % 4 != 0:
        raise ValueError(
            f"{name} has {rows} rows, but four for each image were wanted, in the order of mixing.rotate4."
        )


def _checked_vectors(value: Any, name: str) -> None:
    vectors = _checks.floating_tensor(value, name)
    if vectors.dim() != 2 or vectors.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(vectors.shape)}, but rows of at least one number were wanted, (rows, D)."
        )
