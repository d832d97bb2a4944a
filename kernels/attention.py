"""Attention transfer in Triton: power means of all levels in one launch, their comparison in a second, backward in one.

a = mean_c |f|^p, q = a / max(||a||_2, 1e-12) per sample, loss[l, n] = mean_hw (q_student - q_teacher)^2
(FRSKD, CVPR 2021, arXiv 2103.08273; Zagoruyko and Komodakis, ICLR 2017).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

from ._common import (
    Geometry,
    aligned,
    chunks,
    geometries,
    launch,
    layout_of,
    pixel_offsets,
    power_of_two,
    tail,
    tile_offsets,
    triton_accumulate_dtype,
)

# Elements of one tile and pixels of one step over a map; 4 warps keep a tile of either in registers.
_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048
_MAP_STEP = 1024
_NUM_WARPS = 4
_MOST_FACTORS = 8  # of a power


def _feature_tile(channels: int, pixels: int, channels_contiguous: bool, elements: int) -> tuple[int, int]:
    """(pixels, channels) of a tile: long along the contiguous axis, the other axis takes what is left."""
    if channels_contiguous:
        channel_block = power_of_two(channels, 1, 256)
        return power_of_two(pixels, 1, elements // channel_block), channel_block
    pixel_block = power_of_two(pixels, 1, 128)
    return pixel_block, power_of_two(channels, 1, elements // pixel_block)


def _power(exponent: float) -> tuple[bool, int, float]:
    """Whether p = 2, which needs no power; and |f|^p as |f|^whole * |f|^fraction: a logarithm times p would lose digits."""
    whole = min(math.floor(exponent), _MOST_FACTORS)
    return exponent == 2.0, whole, exponent - whole


@triton.jit
def _absolute_power(
    magnitude,  # |f|
    whole,
    fraction,  # >= 0
):
    """magnitude^(whole + fraction)."""
    # log2(0) = -inf and exp2(-inf) = 0. |f|^0 counts as 1, but a NaN stays a NaN.
    one = tl.where(magnitude == magnitude, 1.0, magnitude)
    power = tl.where(fraction == 0.0, one, tl.exp2(tl.log2(magnitude) * fraction))
    for _ in range(whole):
        power *= magnitude
    return power


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
            total += _absolute_power(tl.abs(value), whole, fraction)
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
    return tl.where(norm < 1e-12, 1e-12, norm)


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
        student_projection = tl.where(student_norm < 1e-12, 0.0, tl.sum(student_products, axis=0))
        teacher_projection = tl.where(teacher_norm < 1e-12, 0.0, tl.sum(teacher_products, axis=0))
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


@triton.jit
def _gradient_tile(
    feature,  # (N, C, H, W)
    gradient,  # (N, C, H, W)
    strides,  # (feature, gradient) x (sample, image row, pixel, channel)
    coefficients,  # (pixels of one sample,)
    upstream,  # scalar
    sample,
    first_pixel,
    first_channel,
    channels,
    pixels,
    width,
    whole,  # factors of a power
    fraction,  # the rest of its exponent
    SQUARE: tl.constexpr,  # p = 2
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """gradient = upstream * coefficient * sign(f) * |f|^(whole + fraction) for one tile."""
    pixel = first_pixel + tl.arange(0, BLOCK_PIXELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
        sample = sample.to(tl.int64)
    if CHANNELS_CONTIGUOUS & 1:
        pixel_mask = pixel < pixels
        channel_mask = channel < aligned(channels, ALIGN)
    else:
        pixel_mask = pixel < aligned(pixels, ALIGN)
        channel_mask = channel < channels
    mask = pixel_mask[:, None] & channel_mask[None, :]
    factor = tl.load(coefficients + pixel, mask=pixel_mask, other=0.0) * upstream
    pixel_offset = pixel_offsets(pixel, width, strides[0], CHANNELS_CONTIGUOUS & 1, FLAT, ALIGN)
    offset = sample * aligned(strides[0][0], ALIGN) + tile_offsets(
        pixel_offset, channel, strides[0], CHANNELS_CONTIGUOUS & 1, ALIGN
    )
    value = tl.load(feature + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if SQUARE:
        slope = value
    else:
        magnitude = _absolute_power(tl.abs(value), whole, fraction)
        slope = tl.where(value < 0.0, -magnitude, tl.where(value == 0.0, 0.0, magnitude))
    pixel_offset = pixel_offsets(pixel, width, strides[1], CHANNELS_CONTIGUOUS & 2, FLAT, ALIGN)
    offset = sample * aligned(strides[1][0], ALIGN) + tile_offsets(
        pixel_offset, channel, strides[1], CHANNELS_CONTIGUOUS & 2, ALIGN
    )
    tl.store(gradient + offset, (factor[:, None] * slope).to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "grad_level_stride", "grad_sample_stride", "whole"])
def _gradient_kernel(
    grad,  # (L, N)
    grad_level_stride,  # elements
    grad_sample_stride,  # elements
    scale: tl.float64,
    coefficients,  # (sum_l N * H_l * W_l,)
    features,  # L x (N, C_l, H_l, W_l)
    gradients,  # L x (N, C_l, H_l, W_l)
    strides,  # L x (feature, gradient) x (sample, image row, pixel, channel)
    channels,  # L x C_l
    pixels,  # L x H_l * W_l
    widths,  # L x W_l
    batch,
    whole,
    fraction: tl.float64,
    LEVELS: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (level, sample, tile of channels, tile of pixels)."""
    program = tl.program_id(0)
    for index in tl.static_range(LEVELS):
        pixel_tiles = tl.cdiv(pixels[index], BLOCK_PIXELS[index])
        tiles = pixel_tiles * tl.cdiv(channels[index], BLOCK_CHANNELS[index])
        if (program >= 0) & (program < batch * tiles):
            sample = program // tiles
            tile = program % tiles
            upstream = tl.load(grad + index * grad_level_stride + sample * grad_sample_stride)
            _gradient_tile(
                features[index],
                gradients[index],
                strides[index],
                coefficients + sample.to(tl.int64) * pixels[index],
                upstream * tl.full([], scale, ACCUMULATE),
                sample,
                (tile % pixel_tiles) * BLOCK_PIXELS[index],
                (tile // pixel_tiles) * BLOCK_CHANNELS[index],
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
        coefficients += batch.to(tl.int64) * pixels[index]


@functools.lru_cache(maxsize=256)
def _plan(tensors: tuple[tuple[Geometry, ...], ...], elements: int) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs of one launch over levels (each one or two tensors of one shape), its arguments and its constants.

    The arguments are (strides, channels, pixels, widths); with one tensor a level, the strides lose that axis. With
    ``elements`` = _FORWARD_TILE a program goes through all channels of its pixels.
    """
    layouts = [layout_of(level, [True] * len(level), merge_samples=False) for level in tensors]
    channels = tuple(level[0][0][1] for level in tensors)
    blocks = [
        _feature_tile(width, layout.pixels, layout.channels_contiguous[0], elements)
        for width, layout in zip(channels, layouts, strict=True)
    ]
    single = len(tensors[0]) == 1
    programs = 0
    for layout, width, (pixel_block, channel_block) in zip(layouts, channels, blocks, strict=True):
        channel_tiles = 1 if elements == _FORWARD_TILE else triton.cdiv(width, channel_block)
        programs += layout.samples * triton.cdiv(layout.pixels, pixel_block) * channel_tiles
    arguments = (
        tuple(layout.strides[0] if single else layout.strides for layout in layouts),
        channels,
        tuple(layout.pixels for layout in layouts),
        tuple(layout.width for layout in layouts),
    )
    constants = {
        "BLOCK_PIXELS": tuple(block[0] for block in blocks),
        "BLOCK_CHANNELS": tuple(block[1] for block in blocks),
        "CHANNELS_CONTIGUOUS": tuple(layout.contiguity for layout in layouts),
        "FLAT": tuple(layout.flat for layout in layouts),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "WIDE": any(layout.wide for layout in layouts),
    }
    return programs, arguments, constants


def _power_means(features: Sequence[Tensor], activity: Tensor, exponent: float) -> None:
    """Write mean_c |f|^p of every map into ``activity``, one behind the other."""
    first = features[0]
    programs, arguments, constants = _plan(tuple([(key,) for key in geometries(features)]), _FORWARD_TILE)
    square, whole, fraction = _power(exponent)
    launch(
        _power_mean_kernel, programs, first.device,
        tuple(features), *arguments, activity, first.shape[0], whole, fraction,
        MAPS=len(features), SQUARE=square, ACCUMULATE=triton_accumulate_dtype(first.dtype),
        num_warps=_NUM_WARPS, **constants,
    )  # fmt: skip


def _map_step(pixels: int) -> int:
    return power_of_two(pixels, 32, _MAP_STEP)


def forward(
    students: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    teachers: Sequence[Tensor],  # L x (N, D_l, H_l, W_l)
    exponent: float,  # p >= 1
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (L, N) and the backward coefficients of the sides that need a gradient; two launches for 8 levels."""
    first = students[0]
    batch, device = first.shape[0], first.device
    dtype = accumulate_dtype(first.dtype)
    accumulate = triton_accumulate_dtype(first.dtype)
    pixels = [student.shape[2] * student.shape[3] for student in students]
    numel = batch * sum(pixels)
    losses = torch.empty((len(students), batch), dtype=dtype, device=device)
    student_coefficients = torch.empty(numel, dtype=dtype, device=device) if need_student else None
    teacher_coefficients = torch.empty(numel, dtype=dtype, device=device) if need_teacher else None
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
            losses if student_coefficients is None else tail(student_coefficients, begin),
            losses if teacher_coefficients is None else tail(teacher_coefficients, begin),
            tuple(pixels[part]),
            tuple([student.shape[1] for student in students[part]]),
            tuple([teacher.shape[1] for teacher in teachers[part]]),
            batch, exponent,
            LEVELS=part.stop - part.start, BLOCK=_map_step(max(pixels[part])), NEED_STUDENT=need_student,
            NEED_TEACHER=need_teacher, ACCUMULATE=accumulate, num_warps=_NUM_WARPS,
        )  # fmt: skip
        begin += count
    return losses, student_coefficients, teacher_coefficients


def backward(
    grad: Tensor,  # (L, N), may be expanded
    scale: float,
    features: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    coefficients: Tensor,  # (N * sum_l H_l * W_l,)
    exponent: float,
) -> list[Tensor]:
    """Gradients of the features, in their dtype and memory format; one launch for 8 levels."""
    gradients = [torch.empty_like(feature) for feature in features]
    first = features[0]
    if coefficients.numel() == 0:
        return gradients
    square, whole, fraction = _power(exponent)
    begin = 0
    for part in chunks(len(features)):
        pairs = tuple(zip(geometries(features[part]), geometries(gradients[part]), strict=True))
        programs, arguments, constants = _plan(pairs, _BACKWARD_TILE)
        launch(
            _gradient_kernel, programs, first.device,
            tail(grad, part.start), grad.stride(0), grad.stride(1), scale, tail(coefficients, begin),
            tuple(features[part]), tuple(gradients[part]), *arguments, first.shape[0], whole - 1, fraction,
            LEVELS=part.stop - part.start, SQUARE=square,
            ACCUMULATE=triton_accumulate_dtype(first.dtype), num_warps=_NUM_WARPS, **constants,
        )  # fmt: skip
        begin += sum(feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features[part])
    return gradients


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
        BLOCK=_map_step(height * width), ACCUMULATE=triton_accumulate_dtype(feature.dtype), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return attention, norms
