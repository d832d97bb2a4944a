"""Logits of several networks and of their fused classifier in Triton: losses and gradients of a row of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.mutual_logits import MutualSettings

from ._common import launch, power_of_two, triton_accumulate_dtype

_STEP = 1024  # rows that are summed at a time
_MOST_CLASSES = 1 << 16


@triton.jit(do_not_specialize=["rows"])
def _valid_kernel(
    targets,  # (N,)
    inverse_valid,  # (), 1 / rows that have a label, 0 where none has
    rows,  # N
    ignore_index,
    STEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program, so that the labels are read once and not by every row."""
    counts = tl.full([STEP], 0, tl.int32)
    for begin in range(0, rows, STEP):
        row = begin + tl.arange(0, STEP)
        label = tl.load(targets + row, mask=row < rows, other=0)
        counts += ((label != ignore_index) & (row < rows)).to(tl.int32)
    valid = tl.sum(counts, axis=0).to(ACCUMULATE)
    tl.store(inverse_valid, tl.where(valid == 0, 0.0, 1.0 / tl.maximum(valid, 1.0)))


@triton.jit
def _targets(z, inside, inverse_temperature, offset, tiny):
    """softmax(z / T) + offset, 0 outside, and its logarithm."""
    exponentials = tl.exp((z - tl.max(z, axis=0)) * inverse_temperature)
    target = tl.where(inside, exponentials / tl.sum(exponentials, axis=0) + offset, 0.0)
    return target, tl.log(tl.where(target < tiny, tiny, target))


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    logits,  # (HEADS, N, K), the fused classifier's last
    targets,  # (N,), or unused
    inverse_valid,  # (), or unused
    weight,  # ()
    row_losses,  # (2, HEADS, N)
    gradients,  # (HEADS, N, K)
    rows,  # N
    classes,  # K
    temperature: tl.float64,
    offset: tl.float64,
    tiny: tl.float64,
    ignore_index,
    HEADS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    head_stride = rows.to(tl.int64) * classes
    column = tl.arange(0, BLOCK)
    inside = column < classes
    place = row * classes + column
    t = tl.full([], temperature, ACCUMULATE)
    o = tl.full([], offset, ACCUMULATE)
    least = tl.full([], tiny, ACCUMULATE)
    inverse_temperature = 1.0 / t
    kd_scale = tl.load(weight) * t / rows.to(ACCUMULATE)
    mass = 1.0 + classes * o
    label = tl.full([], 0, tl.int64)
    ce_scale = tl.full([], 0.0, ACCUMULATE)
    kept = False
    if HAS_TARGETS:
        label = tl.load(targets + row)
        kept = label != ignore_index
        known = (label >= 0) & (label < classes)
        ce_scale = tl.load(inverse_valid)
        ce_scale = tl.where(kept, tl.where(known, ce_scale, float("nan")), 0.0)
    ensemble = tl.zeros([BLOCK], ACCUMULATE)
    for head in tl.static_range(HEADS - 1):
        z = tl.load(logits + head * head_stride + place, mask=inside, other=float("-inf")).to(ACCUMULATE)
        ensemble += z
    fused = tl.load(logits + (HEADS - 1) * head_stride + place, mask=inside, other=float("-inf")).to(ACCUMULATE)
    ensemble_target, ensemble_log = _targets(ensemble / (HEADS - 1), inside, inverse_temperature, o, least)
    fused_target, fused_log = _targets(fused, inside, inverse_temperature, o, least)
    for head in tl.static_range(HEADS):
        z = tl.load(logits + head * head_stride + place, mask=inside, other=float("-inf")).to(ACCUMULATE)
        z = z - tl.max(z, axis=0)
        tempered = tl.exp(z * inverse_temperature)
        total = tl.sum(tempered, axis=0)
        if head == HEADS - 1:
            target = ensemble_target
            log_target = ensemble_log
        else:
            target = fused_target
            log_target = fused_log
        log_p = tl.where(inside, z, 0.0) * inverse_temperature - tl.log(total)
        term = target * (log_target - log_p)
        # Not `target > 0`: a NaN counts.
        divergence = tl.sum(tl.where(inside & (target != 0.0), term, 0.0), axis=0)
        tl.store(row_losses + (HEADS + head) * rows.to(tl.int64) + row, t * t * divergence)
        gradient = kd_scale * (mass * (tempered / total) - target)
        ce = tl.full([], 0.0, ACCUMULATE)
        if HAS_TARGETS:
            plain = tl.exp(z)
            plain_total = tl.sum(plain, axis=0)
            at_label = column == label
            picked = tl.sum(tl.where(at_label, z, 0.0), axis=0)
            # The scale is NaN where the label is no class, and so is its loss.
            ce = tl.where(kept, tl.log(plain_total) - picked + ce_scale * 0.0, 0.0)
            pull = ce_scale * (plain / plain_total - at_label.to(ACCUMULATE))
            gradient += tl.where(kept, pull, 0.0)
        tl.store(row_losses + head * rows.to(tl.int64) + row, ce)
        tl.store(gradients + head * head_stride + place, gradient, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _terms_kernel(
    row_losses,  # (2, HEADS, N)
    inverse_valid,  # (), or unused
    weight,  # ()
    loss,  # ()
    terms,  # (2, HEADS)
    rows,  # N
    HEADS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    STEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program: the means over the rows and the loss."""
    ce_scale = tl.full([], 0.0, ACCUMULATE)
    if HAS_TARGETS:
        ce_scale = tl.load(inverse_valid)
    inverse_rows = 1.0 / tl.maximum(rows, 1).to(ACCUMULATE)
    pull = tl.load(weight)
    total = tl.full([], 0.0, ACCUMULATE)
    for term in tl.static_range(2 * HEADS):
        sums = tl.zeros([STEP], ACCUMULATE)
        for begin in range(0, rows, STEP):
            row = begin + tl.arange(0, STEP)
            sums += tl.load(row_losses + term * rows.to(tl.int64) + row, mask=row < rows, other=0.0)
        mean = tl.sum(sums, axis=0)
        if term < HEADS:
            mean = mean * ce_scale
            total += mean
        else:
            mean = mean * inverse_rows
            total += pull * mean
        tl.store(terms + term, mean)
    tl.store(loss, total)


def forward(
    logits: Sequence[Tensor], targets: Tensor | None, weight: Tensor, settings: MutualSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms (2, S + 1) and its gradients (S + 1, N, K), in three launches behind one that stacks the logits."""
    together = torch.stack(list(logits))
    heads, rows, classes = together.shape
    if classes > _MOST_CLASSES:
        raise RuntimeError(
            f"logits have {classes} classes, but the Triton kernel takes at most {_MOST_CLASSES}; use impl='reference'."
        )
    device, dtype = together.device, accumulate_dtype(together.dtype)
    accumulate = triton_accumulate_dtype(together.dtype)
    loss = torch.empty((), dtype=dtype, device=device)
    terms = torch.empty((2, heads), dtype=dtype, device=device)
    gradients = torch.empty((heads, rows, classes), dtype=dtype, device=device)
    row_losses = torch.empty((2, heads, rows), dtype=dtype, device=device)
    labels, inverse_valid = weight, weight  # unused
    block = power_of_two(classes, 16, _MOST_CLASSES)
    if targets is not None:
        labels, inverse_valid = targets.contiguous(), torch.empty((), dtype=dtype, device=device)
        launch(
            _valid_kernel, 1, device,
            labels, inverse_valid, rows, settings.ignore_index, STEP=_STEP, ACCUMULATE=accumulate, num_warps=4,
        )  # fmt: skip
    launch(
        _rows_kernel, rows, device,
        together, labels, inverse_valid, weight, row_losses, gradients, rows, classes,
        settings.temperature, settings.offset, torch.finfo(dtype).tiny, settings.ignore_index,
        HEADS=heads, HAS_TARGETS=targets is not None, BLOCK=block, ACCUMULATE=accumulate,
        num_warps=power_of_two(block // 128, 4, 16),
    )  # fmt: skip
    launch(
        _terms_kernel, 1, device,
        row_losses, inverse_valid, weight, loss, terms, rows,
        HEADS=heads, HAS_TARGETS=targets is not None, STEP=_STEP, ACCUMULATE=accumulate, num_warps=4,
    )  # fmt: skip
    return loss, terms, gradients
