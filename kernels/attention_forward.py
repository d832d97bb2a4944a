"""Attention transfer in Triton, forward: power means of all levels in one launch, their comparison in a second; the map.

The formula is in ``_attention``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.attention import NORM_FLOOR
from frskd_fast.reference.dtypes import accumulate_dtype

from ._attention import NUM_WARPS, absolute_power, plan, power_of
from ._common import (
    aligned,
    chunks,
    geometries,
    launch,
    pixel_offsets,
    power_of_two,
    tail,
    tile_offsets,
    triton_accumulate_dtype,
)

_TILE = 4096  # elements of a map
_MAP_STEP = 1024  # pixels of one step over a map
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def _power_mean_tile(
    feature,  # (N, C, H, W)
    strides,  # (sample, image row, pixel, channel)
    activity,  # (pixels of one sample,)
    sample,
    first_pixel,
    channels,
    pixels,
    width,
    whole,  # factors of a power
    fraction,  # the rest of its exponent
    SQUARE: tl.constexpr,  # p = 2
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """activity = mean_c |f|^p for BLOCK_PIXELS pixels of one sample."""
    pixel = first_pixel + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
        sample = sample.to(tl.int64)
    if CHANNELS_CONTIGUOUS:
        pixel_mask = pixel < pixels
        channel_end = aligned(channels, ALIGN)
    else:
        pixel_mask = pixel < aligned(pixels, ALIGN)
        channel_end = channels
    pixel_offset = pixel_offsets(pixel, width, strides, CHANNELS_CONTIGUOUS, FLAT, ALIGN)
    base = feature + sample * aligned(strides[0], ALIGN)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        here = first_channel + channel
        offset = tile_offsets(pixel_offset, here, strides, CHANNELS_CONTIGUOUS, ALIGN)
        mask = pixel_mask[:, None] & (here < channel_end)[None, :]
        value = tl.load(base + offset, mask=mask, other=0.0).to(ACCUMULATE)
        if SQUARE:
            total += value * value
        else:
            total += absolute_power(tl.abs(value), whole, fraction)
    tl.store(activity + pixel, tl.sum(total, axis=1) / channels, mask=pixel_mask)


@triton.jit(do_not_specialize=["batch", "whole"])
def _power_mean_kernel(
    features,  # maps x (N, C, H, W)
    strides,  # maps x (sample, image row, pixel, channel)
    channels,  # maps x C
    pixels,  # maps x H * W
    widths,  # maps x W
    activity,  # (sum over maps of N * H * W,), map by map
    batch,
    whole,
    fraction: tl.float64,
    MAPS: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (map, sample, tile of pixels)."""
    program = tl.program_id(0)
    for index in tl.static_range(MAPS):
        tiles = tl.cdiv(pixels[index], BLOCK_PIXELS[index])
        if (program >= 0) & (program < batch * tiles):
            sample = program // tiles
            _power_mean_tile(
                features[index],
                strides[index],
                activity + sample.to(tl.int64) * pixels[index],
                sample,
                (program % tiles) * BLOCK_PIXELS[index],
                channels[index],
                pixels[index],
                widths[index],
                whole,
                tl.full([], fraction, ACCUMULATE),
                SQUARE,
                BLOCK_PIXELS[index],
                BLOCK_CHANNELS[index],
                CHANNELS_CONTIGUOUS[index],
                FLAT[index],
                ALIGN[index],
                WIDE,
                ACCUMULATE,
            )
        program -= batch * tiles
        activity += batch.to(tl.int64) * pixels[index]


@triton.jit
def _norm(activity, pixels, BLOCK: tl.constexpr):
    """||activity||_2 in float64: the square of a float32 can leave the range of float32 on both sides."""
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, pixels, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        value = tl.load(activity + pixel, mask=pixel < pixels, other=0.0).to(tl.float64)
        squares += value * value
    return tl.sqrt(tl.sum(squares, axis=0))


@triton.jit
def _clamped(norm):
    """max(norm, 1e-12); a NaN stays a NaN."""
    return tl.where(norm < _NORM_FLOOR, _NORM_FLOOR, norm)


@triton.jit
def _normalised(
    activity,  # (pixels,)
    divisor,  # scalar, float64
    ACCUMULATE: tl.constexpr,
):
    """activity / divisor, rounded once: float64 multiplication is slow on many GPUs and division slower still."""
    if ACCUMULATE == tl.float64:
        quotient = activity / divisor
    else:
        quotient = (activity * (1.0 / divisor)).to(ACCUMULATE)
    return quotient


@triton.jit(do_not_specialize=["batch"])
def _compare_kernel(
    activity,  # (2 * sum_l N * H_l * W_l,), students first
    losses,  # (L, N)
    student_coefficients,  # (sum_l N * H_l * W_l,)
    teacher_coefficients,  # (sum_l N * H_l * W_l,)
    pixels,  # L x H_l * W_l
    student_channels,  # L x C_l
    teacher_channels,  # L x D_l
    batch,
    exponent: tl.float64,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEED_STUDENT: tl.constexpr,
    NEED_TEACHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (level, sample): norms, loss, and d loss / d activity * p / C."""
    program = tl.program_id(0)
    level = program // batch
    sample = program % batch
    count = sample * 0
    student_width = count
    teacher_width = count
    first = count.to(tl.int64)
    total = first
    for index in tl.static_range(LEVELS):
        here = level == index
        count = tl.where(here, pixels[index], count)
        student_width = tl.where(here, student_channels[index], student_width)
        teacher_width = tl.where(here, teacher_channels[index], teacher_width)
        total += batch.to(tl.int64) * pixels[index]
        first = tl.where(level > index, total, first)
    first += sample.to(tl.int64) * count
    student_activity = activity + first
    teacher_activity = activity + total + first

    student_norm = _norm(student_activity, count, BLOCK)
    teacher_norm = _norm(teacher_activity, count, BLOCK)
    student_divisor = _clamped(student_norm)
    teacher_divisor = _clamped(teacher_norm)

    squares = tl.zeros([BLOCK], ACCUMULATE)
    student_products = tl.zeros([BLOCK], ACCUMULATE)
    teacher_products = tl.zeros([BLOCK], ACCUMULATE)
    for begin in range(0, count, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        mask = pixel < count
        student = _normalised(tl.load(student_activity + pixel, mask=mask, other=0.0), student_divisor, ACCUMULATE)
        teacher = _normalised(tl.load(teacher_activity + pixel, mask=mask, other=0.0), teacher_divisor, ACCUMULATE)
        difference = student - teacher
        squares += difference * difference
        student_products += student * difference
        teacher_products -= teacher * difference
    tl.store(losses + program, tl.sum(squares, axis=0) / count)

    if NEED_STUDENT or NEED_TEACHER:
        # Below the floor the clamp passes no gradient through the norm.
        student_projection = tl.where(student_norm < _NORM_FLOOR, 0.0, tl.sum(student_products, axis=0))
        teacher_projection = tl.where(teacher_norm < _NORM_FLOOR, 0.0, tl.sum(teacher_products, axis=0))
        scale = tl.full([], exponent, tl.float64) * 2.0 / count
        student_factor = (scale / student_width / student_divisor).to(ACCUMULATE)
        teacher_factor = (scale / teacher_width / teacher_divisor).to(ACCUMULATE)
        for begin in range(0, count, BLOCK):
            pixel = begin + tl.arange(0, BLOCK)
            mask = pixel < count
            student = _normalised(tl.load(student_activity + pixel, mask=mask, other=0.0), student_divisor, ACCUMULATE)
            teacher = _normalised(tl.load(teacher_activity + pixel, mask=mask, other=0.0), teacher_divisor, ACCUMULATE)
            difference = student - teacher
            if NEED_STUDENT:
                coefficient = (difference - student * student_projection) * student_factor
                tl.store(student_coefficients + first + pixel, coefficient, mask=mask)
            if NEED_TEACHER:
                coefficient = (-difference - teacher * teacher_projection) * teacher_factor
                tl.store(teacher_coefficients + first + pixel, coefficient, mask=mask)


@triton.jit
def _normalise_kernel(
    activity,  # (N, H * W)
    attention,  # (N, H * W)
    norms,  # (N,)
    pixels,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each sample: norm and attention = activity / max(norm, 1e-12)."""
    sample = tl.program_id(0)
    first = sample.to(tl.int64) * pixels
    norm = _norm(activity + first, pixels, BLOCK)
    divisor = _clamped(norm)
    tl.store(norms + sample, norm.to(ACCUMULATE))
    for begin in range(0, pixels, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        mask = pixel < pixels
        value = tl.load(activity + first + pixel, mask=mask, other=0.0)
        tl.store(attention + first + pixel, _normalised(value, divisor, ACCUMULATE), mask=mask)


def _power_means(features: Sequence[Tensor], activity: Tensor, exponent: float) -> None:
    """Write mean_c |f|^p of every map into ``activity``, one behind the other."""
    first = features[0]
    programs, arguments, constants = plan(tuple([(key,) for key in geometries(features)]), _TILE, all_channels=True)
    square, whole, fraction = power_of(exponent)
    launch(
        _power_mean_kernel, programs, first.device,
        tuple(features), *arguments, activity, first.shape[0], whole, fraction,
        MAPS=len(features), SQUARE=square, ACCUMULATE=triton_accumulate_dtype(first.dtype),
        num_warps=NUM_WARPS, **constants,
    )  # fmt: skip


def _map_step(pixels: int) -> int:
    return power_of_two(pixels, 32, _MAP_STEP)


def forward(
    students: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    teachers: Sequence[Tensor],  # L x (N, D_l, H_l, W_l)
    exponent: float,  # p >= 1
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (L, N) and the backward coefficients of both sides, empty where not needed; two launches for 8 levels."""
    first = students[0]
    batch, device = first.shape[0], first.device
    dtype = accumulate_dtype(first.dtype)
    accumulate = triton_accumulate_dtype(first.dtype)
    pixels = [student.shape[2] * student.shape[3] for student in students]
    numel = batch * sum(pixels)
    losses = torch.empty((len(students), batch), dtype=dtype, device=device)
    student_coefficients = torch.empty(numel if need_student else 0, dtype=dtype, device=device)
    teacher_coefficients = torch.empty(numel if need_teacher else 0, dtype=dtype, device=device)
    if numel == 0:
        return losses, student_coefficients, teacher_coefficients
    begin = 0
    for part in chunks(len(students)):
        count = batch * sum(pixels[part])
        activity = torch.empty(2 * count, dtype=dtype, device=device)
        _power_means([*students[part], *teachers[part]], activity, exponent)
        launch(
            _compare_kernel, (part.stop - part.start) * batch, device,
            activity, tail(losses, part.start),
            # Absent coefficients are not written; the argument only fills the place.
            tail(student_coefficients, begin) if need_student else losses,
            tail(teacher_coefficients, begin) if need_teacher else losses,
            tuple(pixels[part]),
            tuple([student.shape[1] for student in students[part]]),
            tuple([teacher.shape[1] for teacher in teachers[part]]),
            batch, exponent,
            LEVELS=part.stop - part.start, BLOCK=_map_step(max(pixels[part])), NEED_STUDENT=need_student,
            NEED_TEACHER=need_teacher, ACCUMULATE=accumulate, num_warps=NUM_WARPS,
        )  # fmt: skip
        begin += count
    return losses, student_coefficients, teacher_coefficients


def attention_map(feature: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Normalised map (N, H*W) and the norm (N,) before the clamp; two launches."""
    dtype = accumulate_dtype(feature.dtype)
    batch, _, height, width = feature.shape
    activity = torch.empty((batch, height * width), dtype=dtype, device=feature.device)
    attention = torch.empty_like(activity)
    norms = torch.empty(batch, dtype=dtype, device=feature.device)
    if activity.numel() == 0:
        return attention, norms
    _power_means([feature], activity, exponent)
    launch(
        _normalise_kernel, batch, feature.device,
        activity, attention, norms, height * width,
        BLOCK=_map_step(height * width), ACCUMULATE=triton_accumulate_dtype(feature.dtype), num_warps=NUM_WARPS,
    )  # fmt: skip
    return attention, norms
