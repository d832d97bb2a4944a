"""Cross-entropy and T^2-scaled Kullback-Leibler divergence on rows of class logits in Triton, one launch each way.

Rows are taken as tiles of (rows, classes) whatever the memory format: a tile is long along the contiguous axis, so
lanes run along the classes of (N, K) and channels_last logits and along the pixels of NCHW maps. A row wider than its
tile is gathered by an online softmax. Everything is kept relative to the row's maximum, so an offset common to a row's
logits costs no accuracy. Notation: z logits, T temperature, p = softmax(z / T).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
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

# Kinds of labels.
_NONE, _INDICES, _TWO_INDICES, _PROBABILITIES = 0, 1, 2, 3

# Heads with more rows than this have their valid rows counted by a second launch, the others by their first program.
_COUNT_LIMIT = 8192
_COUNT_STEP = 1024


def _logits_tile(classes: int, pixels: int, classes_contiguous: bool, element_size: int) -> tuple[int, int]:
    """(rows, classes) of a tile. Two tiles, student and teacher, must stay in registers with their exponentials."""
    if classes_contiguous:
        class_block = power_of_two(classes, 1, 4096)
        return power_of_two(pixels, 1, max(1024 // class_block, 1)), class_block
    # Four warps with four pixels a lane: every sum over classes then stays inside a lane.
    row_block = power_of_two(pixels, 1, 512 if element_size <= 4 else 256)
    return row_block, power_of_two(classes, 1, 2048 // row_block)


def _num_warps(rows: int, classes: int, single: bool) -> int:
    """Warps for a tile: at most 16 elements of each of its tensors in a lane, 8 where a row takes several tiles."""
    if rows * classes <= 2048:
        return 4
    return 8 if single else 16


def _plain_power(temperature: float) -> int:
    """exp(z) = exp(z / T)^T takes no exponential of its own for these temperatures; 0 for the others."""
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


@triton.jit
def _exponentials(
    z,  # logits relative to a point near the row's maximum
    inverse_temperature,
    POWER: tl.constexpr,
):
    """exp(z / T) and exp(z)."""
    tempered = tl.exp(z * inverse_temperature)
    if POWER == 1:
        plain = tempered
    elif POWER == 2:
        plain = tempered * tempered
    elif POWER == 4:
        plain = tempered * tempered
        plain = plain * plain
    else:
        plain = tl.exp(z)
    return tempered, plain


@triton.jit
def _centre(maximum):
    """What to subtract from logits whose maximum so far is ``maximum``: 0 while every class was masked (-inf)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _shift(old_maximum, new_maximum):
    """Change of the centre, to be added to relative logits; 0 where there was no class before."""
    return tl.where(old_maximum == float("-inf"), 0.0, old_maximum - _centre(new_maximum))


@triton.jit
def _label_weights(
    target,  # pointer to class probabilities, or unused
    offset,  # (rows, classes)
    mask,  # (rows, classes)
    smoothing,
    classes,
    LABELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The part of the label distribution that is dense in the classes; 0 outside the mask."""
    uniform = smoothing / classes
    if LABELS == 3:
        probability = tl.load(target + offset, mask=mask, other=0.0).to(ACCUMULATE)
        weight = tl.where(mask, (1.0 - smoothing) * probability + uniform, 0.0)
    else:
        weight = tl.where(mask, uniform, 0.0)
    return weight


@triton.jit
def _index_cross_entropy(
    logits,  # pointer to the first class of each row, (rows,)
    class_stride,
    label,  # (rows,)
    centre,  # (rows,)
    log_sum,  # (rows,) log sum_k exp(z_k - centre)
    dense_dot,  # (rows,) s / K * sum_k (z_k - centre)
    smoothing,
    classes,
    ignore_index,
    row_mask,
    ACCUMULATE: tl.constexpr,
):
    """lse(z) - (1 - s) z_y - s mean_k z_k; 0 where the label is ignored, NaN where it is no class."""
    kept = label != ignore_index
    known = (label >= 0) & (label < classes)
    picked = tl.load(logits + label * class_stride, mask=row_mask & kept & known, other=0.0).to(ACCUMULATE)
    loss = (log_sum - dense_dot) - (1.0 - smoothing) * (picked - centre)
    return tl.where(kept, tl.where(known, loss, float("nan")), 0.0)


@triton.jit
def _forward_tile(
    student,  # (N, K, H, W)
    teacher,  # (N, K, H, W)
    target,  # (N, H, W) or (N, K, H, W)
    target_b,  # (N, H, W)
    strides,  # (student, teacher, target, target_b) x (sample, image row, pixel, class)
    losses,  # (4, R), at the head's first row
    statistics,  # (4, R), at the head's first row
    all_rows,  # R
    sample,
    first_pixel,
    classes,
    pixels,
    width,
    mix,
    smoothing,
    ignore_index,
    temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    SINGLE: tl.constexpr,
    CLASSES_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Losses and statistics of BLOCK_ROWS rows; returns the sum of their weights."""
    pixel = first_pixel + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_CLASSES)
    if WIDE:
        pixel = pixel.to(tl.int64)
        column = column.to(tl.int64)
        sample = sample.to(tl.int64)
    if CLASSES_CONTIGUOUS & 1:
        row_mask = pixel < pixels
        class_end = aligned(classes, ALIGN)
    else:
        # Eight 16-bit pixels in a lane would not leave enough registers for the sums of their rows.
        pixel = tl.max_contiguous(pixel, 4)
        row_mask = pixel < aligned(pixels, ALIGN)
        class_end = classes
    student += sample * aligned(strides[0][0], ALIGN)
    student_rows = pixel_offsets(pixel, width, strides[0], CLASSES_CONTIGUOUS & 1, FLAT, ALIGN)
    teacher += sample * aligned(strides[1][0], ALIGN)
    teacher_rows = pixel_offsets(pixel, width, strides[1], CLASSES_CONTIGUOUS & 2, FLAT, ALIGN)
    target += sample * strides[2][0]
    target_rows = pixel_offsets(pixel, width, strides[2], CLASSES_CONTIGUOUS & 4, FLAT, ALIGN)
    inverse_temperature = 1.0 / temperature

    zeros = tl.zeros([BLOCK_ROWS], ACCUMULATE)
    student_max = zeros + float("-inf")
    teacher_max = student_max
    student_sum = zeros
    student_sum_tempered = zeros
    teacher_sum = zeros
    teacher_sum_tempered = zeros
    # sum_k exp(teacher / T) * (teacher - student), of relative logits
    cross = zeros
    # The dense part of the labels: sum_k t_k and sum_k t_k z_k, of relative logits.
    mass = zeros
    student_dot = zeros
    teacher_dot = zeros
    for first_class in range(0, BLOCK_CLASSES if SINGLE else classes, BLOCK_CLASSES):
        here = first_class + column
        mask = row_mask[:, None] & (here < class_end)[None, :]
        offset = tile_offsets(student_rows, here, strides[0], CLASSES_CONTIGUOUS & 1, ALIGN)
        z_student = tl.load(student + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
        maximum = tl.maximum(student_max, tl.max(z_student, axis=1))
        z_student -= _centre(maximum)[:, None]
        student_shift = _shift(student_max, maximum)
        student_max = maximum
        tempered, plain = _exponentials(z_student, inverse_temperature, POWER)
        if SINGLE:
            student_sum_tempered = tl.sum(tempered, axis=1)
            student_sum = tl.sum(plain, axis=1)
        else:
            rescale_tempered, rescale = _exponentials(student_shift, inverse_temperature, POWER)
            student_sum_tempered = student_sum_tempered * rescale_tempered + tl.sum(tempered, axis=1)
            student_sum = student_sum * rescale + tl.sum(plain, axis=1)
        if HAS_TEACHER:
            offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
            z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            maximum = tl.maximum(teacher_max, tl.max(z_teacher, axis=1))
            z_teacher -= _centre(maximum)[:, None]
            teacher_shift = _shift(teacher_max, maximum)
            teacher_max = maximum
            tempered, plain = _exponentials(z_teacher, inverse_temperature, POWER)
            # A class the teacher excludes contributes 0, whatever the student says.
            product = tl.sum(tl.where(tempered == 0.0, 0.0, tempered * (z_teacher - z_student)), axis=1)
            if SINGLE:
                cross = product
                teacher_sum_tempered = tl.sum(tempered, axis=1)
                teacher_sum = tl.sum(plain, axis=1)
            else:
                rescale_tempered, rescale = _exponentials(teacher_shift, inverse_temperature, POWER)
                moved = rescale_tempered * (cross + teacher_sum_tempered * (teacher_shift - student_shift))
                cross = tl.where(rescale_tempered == 0.0, 0.0, moved) + product
                teacher_sum_tempered = teacher_sum_tempered * rescale_tempered + tl.sum(tempered, axis=1)
                teacher_sum = teacher_sum * rescale + tl.sum(plain, axis=1)
        if LABELS == 3 or (SMOOTH and LABELS != 0):
            offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
            weight = _label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
            student_dot += mass * student_shift + tl.sum(tl.where(weight == 0.0, 0.0, weight * z_student), axis=1)
            if HAS_TEACHER:
                teacher_dot += mass * teacher_shift + tl.sum(tl.where(weight == 0.0, 0.0, weight * z_teacher), axis=1)
            mass += tl.sum(weight, axis=1)

    row = sample.to(tl.int64) * pixels + pixel
    losses += row
    statistics += row
    student_centre = _centre(student_max)
    teacher_centre = _centre(teacher_max)
    student_log = tl.log(student_sum)
    student_log_tempered = tl.log(student_sum_tempered)
    tl.store(statistics, student_centre + student_log, mask=row_mask)
    tl.store(statistics + 2 * all_rows, student_centre * inverse_temperature + student_log_tempered, mask=row_mask)
    kd = zeros
    teacher_log = zeros
    if HAS_TEACHER:
        teacher_log = tl.log(teacher_sum)
        teacher_log_tempered = tl.log(teacher_sum_tempered)
        tl.store(statistics + all_rows, teacher_centre + teacher_log, mask=row_mask)
        tl.store(statistics + 3 * all_rows, teacher_centre * inverse_temperature + teacher_log_tempered, mask=row_mask)
        mean_difference = cross / teacher_sum_tempered * inverse_temperature
        # One logarithm of the ratio: the difference of two would lose the digits of a small divergence.
        log_ratio = tl.log(teacher_sum_tempered / student_sum_tempered)
        kd = temperature * temperature * (mean_difference - log_ratio)
    else:
        tl.store(statistics + all_rows, zeros, mask=row_mask)
        tl.store(statistics + 3 * all_rows, zeros, mask=row_mask)

    ce_student = zeros
    ce_teacher = zeros
    weight = zeros
    if LABELS == 3:
        ce_student = tl.where(mass == 0.0, 0.0, student_log * mass - student_dot)
        if HAS_TEACHER:
            ce_teacher = tl.where(mass == 0.0, 0.0, teacher_log * mass - teacher_dot)
        weight = zeros + 1.0
    elif LABELS != 0:
        label = tl.load(target + target_rows, mask=row_mask, other=0)
        weight = tl.where(label != ignore_index, 1.0, zeros)
        ce_student = _index_cross_entropy(
            student + student_rows, strides[0][3], label, student_centre, student_log, student_dot,
            smoothing, classes, ignore_index, row_mask, ACCUMULATE,
        )  # fmt: skip
        if HAS_TEACHER:
            ce_teacher = _index_cross_entropy(
                teacher + teacher_rows, strides[1][3], label, teacher_centre, teacher_log, teacher_dot,
                smoothing, classes, ignore_index, row_mask, ACCUMULATE,
            )  # fmt: skip
        if LABELS == 2:
            target_b_rows = pixel_offsets(pixel, width, strides[3], CLASSES_CONTIGUOUS & 8, FLAT, ALIGN)
            label = tl.load(target_b + sample * strides[3][0] + target_b_rows, mask=row_mask, other=0)
            weight = mix * weight + (1.0 - mix) * tl.where(label != ignore_index, 1.0, zeros)
            second = _index_cross_entropy(
                student + student_rows, strides[0][3], label, student_centre, student_log, student_dot,
                smoothing, classes, ignore_index, row_mask, ACCUMULATE,
            )  # fmt: skip
            ce_student = mix * ce_student + (1.0 - mix) * second
            if HAS_TEACHER:
                second = _index_cross_entropy(
                    teacher + teacher_rows, strides[1][3], label, teacher_centre, teacher_log, teacher_dot,
                    smoothing, classes, ignore_index, row_mask, ACCUMULATE,
                )  # fmt: skip
                ce_teacher = mix * ce_teacher + (1.0 - mix) * second
    tl.store(losses, ce_student, mask=row_mask)
    tl.store(losses + all_rows, ce_teacher, mask=row_mask)
    tl.store(losses + 2 * all_rows, kd, mask=row_mask)
    tl.store(losses + 3 * all_rows, weight, mask=row_mask)
    return tl.sum(tl.where(row_mask, weight, 0.0), axis=0)


@triton.jit
def _inverse_count(valid):
    """1 / valid, 0 when there is no valid row."""
    return tl.where(valid == 0.0, 0.0, 1.0 / tl.where(valid == 0.0, 1.0, valid))


@triton.jit
def _valid_rows(
    target,  # (N, H, W)
    target_b,  # (N, H, W)
    strides,  # (student, teacher, target, target_b) x (sample, image row, pixel, class)
    samples,
    pixels,
    width,
    mix,
    ignore_index,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    LABELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Sum of the row weights of one head, from its labels."""
    total = tl.zeros([BLOCK], ACCUMULATE)
    for first in range(0, samples * pixels, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mask = row < samples * pixels
        sample = (row // pixels).to(tl.int64)
        pixel = (row % pixels).to(tl.int64)
        offset = sample * strides[2][0] + pixel_offsets(pixel, width, strides[2], False, FLAT, 1)
        kept = mask & (tl.load(target + offset, mask=mask, other=0) != ignore_index)
        if LABELS == 2:
            total += tl.where(kept, mix, 0.0)
            offset = sample * strides[3][0] + pixel_offsets(pixel, width, strides[3], False, FLAT, 1)
            kept = mask & (tl.load(target_b + offset, mask=mask, other=0) != ignore_index)
            total += tl.where(kept, 1.0 - mix, 0.0)
        else:
            total += tl.where(kept, 1.0, 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["all_rows", "ignore_index"])
def _forward_kernel(
    students,  # heads x (N, K, H, W)
    teachers,  # heads x (N, K, H, W)
    targets,  # heads x (N, H, W) or (N, K, H, W)
    targets_b,  # heads x (N, H, W)
    strides,  # heads x (student, teacher, target, target_b) x (sample, image row, pixel, class)
    samples,  # heads x N
    classes,  # heads x K
    pixels,  # heads x H * W
    widths,  # heads x W
    losses,  # (4, R)
    statistics,  # (4, R)
    inverse_valid,  # (heads,)
    partials,  # (programs,) sums of row weights
    all_rows,  # R
    mix: tl.float64,
    smoothing: tl.float64,
    ignore_index,
    temperature: tl.float64,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    SINGLE: tl.constexpr,
    CLASSES_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    COUNT_HERE: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (head, sample, tile of rows)."""
    program = tl.program_id(0)
    mix = tl.full([], mix, ACCUMULATE)
    smoothing = tl.full([], smoothing, ACCUMULATE)
    temperature = tl.full([], temperature, ACCUMULATE)
    all_rows = all_rows.to(tl.int64)
    for index in tl.static_range(HEADS):
        tiles = tl.cdiv(pixels[index], BLOCK_ROWS[index])
        if (program >= 0) & (program < samples[index] * tiles):
            weight = _forward_tile(
                students[index], teachers[index], targets[index], targets_b[index], strides[index],
                losses, statistics, all_rows,
                program // tiles, (program % tiles) * BLOCK_ROWS[index],
                classes[index], pixels[index], widths[index], mix, smoothing, ignore_index, temperature,
                BLOCK_ROWS[index], BLOCK_CLASSES[index], SINGLE[index], CLASSES_CONTIGUOUS[index], FLAT[index],
                ALIGN[index], WIDE, HAS_TEACHER, LABELS, SMOOTH, POWER, ACCUMULATE,
            )  # fmt: skip
            if COUNT_HERE:
                if program == 0:
                    valid = tl.full([], 0.0, ACCUMULATE)
                    if LABELS == 3:
                        valid = valid + samples[index] * pixels[index]
                    elif LABELS != 0:
                        valid = _valid_rows(
                            targets[index], targets_b[index], strides[index], samples[index], pixels[index],
                            widths[index], mix, ignore_index, COUNT_BLOCK, FLAT[index], LABELS, ACCUMULATE,
                        )  # fmt: skip
                    tl.store(inverse_valid + index, _inverse_count(valid))
            else:
                tl.store(partials + tl.program_id(0), weight)
        program -= samples[index] * tiles
        losses += tl.full([], samples[index], tl.int64) * pixels[index]
        statistics += tl.full([], samples[index], tl.int64) * pixels[index]


@triton.jit
def _count_kernel(
    partials,  # (programs of the forward launch,)
    ends,  # heads x number of the head's last program + 1
    inverse_valid,  # (heads,)
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each head: 1 / sum of its row weights."""
    head = tl.program_id(0)
    begin = head * 0
    end = begin + ends[0]
    for index in tl.static_range(1, HEADS):
        begin = tl.where(head == index, ends[index - 1], begin)
        end = tl.where(head == index, ends[index], end)
    total = tl.zeros([BLOCK], ACCUMULATE)
    for first in range(begin, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total += tl.load(partials + column, mask=column < end, other=0.0)
    tl.store(inverse_valid + head, _inverse_count(tl.sum(total, axis=0)))


@triton.jit
def _gradient_tile(
    student,  # (N, K, H, W)
    teacher,  # (N, K, H, W)
    target,  # (N, H, W) or (N, K, H, W)
    target_b,  # (N, H, W)
    student_gradient,  # (N, K, H, W)
    teacher_gradient,  # (N, K, H, W)
    strides,  # (student, teacher, target, target_b, student and teacher gradient) x (sample, image row, pixel, class)
    statistics,  # (4, R), at the head's first row
    losses,  # (4, R), at the head's first row
    upstream,  # three pointers to d / d (ce_student, ce_teacher, kd), at the head's first row
    row_strides,  # three strides of ``upstream``
    scales,  # three factors of ``upstream``
    all_rows,  # R
    sample,
    first_pixel,
    classes,
    pixels,
    width,
    mix,
    smoothing,
    ignore_index,
    temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    SINGLE: tl.constexpr,
    CLASSES_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    NEED_STUDENT: tl.constexpr,
    NEED_TEACHER: tl.constexpr,
    CE_STUDENT: tl.constexpr,
    CE_TEACHER: tl.constexpr,
    KD_STUDENT: tl.constexpr,
    KD_TEACHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Gradients of BLOCK_ROWS rows."""
    pixel = first_pixel + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_CLASSES)
    if WIDE:
        pixel = pixel.to(tl.int64)
        column = column.to(tl.int64)
        sample = sample.to(tl.int64)
    if CLASSES_CONTIGUOUS & 1:
        row_mask = pixel < pixels
        class_end = aligned(classes, ALIGN)
    else:
        # Eight 16-bit pixels in a lane would not leave enough registers for the sums of their rows.
        pixel = tl.max_contiguous(pixel, 4)
        row_mask = pixel < aligned(pixels, ALIGN)
        class_end = classes
    READ_STUDENT: tl.constexpr = CE_STUDENT or KD_STUDENT or KD_TEACHER
    READ_TEACHER: tl.constexpr = CE_TEACHER or KD_STUDENT or KD_TEACHER
    DENSE: tl.constexpr = (CE_STUDENT or CE_TEACHER) and (LABELS == 3 or SMOOTH)
    student += sample * aligned(strides[0][0], ALIGN)
    student_rows = pixel_offsets(pixel, width, strides[0], CLASSES_CONTIGUOUS & 1, FLAT, ALIGN)
    teacher += sample * aligned(strides[1][0], ALIGN)
    teacher_rows = pixel_offsets(pixel, width, strides[1], CLASSES_CONTIGUOUS & 2, FLAT, ALIGN)
    target += sample * strides[2][0]
    target_rows = pixel_offsets(pixel, width, strides[2], CLASSES_CONTIGUOUS & 4, FLAT, ALIGN)
    student_gradient += sample * aligned(strides[4][0], ALIGN)
    student_gradient_rows = pixel_offsets(pixel, width, strides[4], CLASSES_CONTIGUOUS & 16, FLAT, ALIGN)
    teacher_gradient += sample * aligned(strides[5][0], ALIGN)
    teacher_gradient_rows = pixel_offsets(pixel, width, strides[5], CLASSES_CONTIGUOUS & 32, FLAT, ALIGN)
    inverse_temperature = 1.0 / temperature

    row = sample.to(tl.int64) * pixels + pixel
    zeros = tl.zeros([BLOCK_ROWS], ACCUMULATE)
    grad_ce_student = zeros
    grad_ce_teacher = zeros
    grad_kd = zeros
    if CE_STUDENT:
        present = tl.where(row_mask, scales[0], 0.0) != 0.0
        grad_ce_student = tl.load(upstream[0] + row * row_strides[0], mask=present, other=0.0) * scales[0]
    if CE_TEACHER:
        present = tl.where(row_mask, scales[1], 0.0) != 0.0
        grad_ce_teacher = tl.load(upstream[1] + row * row_strides[1], mask=present, other=0.0) * scales[1]
    if KD_STUDENT or KD_TEACHER:
        present = tl.where(row_mask, scales[2], 0.0) != 0.0
        grad_kd = tl.load(upstream[2] + row * row_strides[2], mask=present, other=0.0) * (scales[2] * temperature)

    # Logits are taken relative to a log-sum-exp: it is near the maximum, and the subtraction rounds once.
    student_centre = zeros
    teacher_centre = zeros
    student_sum = zeros
    student_sum_tempered = zeros
    teacher_sum = zeros
    teacher_sum_tempered = zeros
    if READ_STUDENT:
        log_sum = tl.load(statistics + row, mask=row_mask, other=0.0)
        log_sum_tempered = tl.load(statistics + 2 * all_rows + row, mask=row_mask, other=0.0)
        student_centre = tl.where(temperature < 1.0, log_sum_tempered * temperature, log_sum)
        student_sum = tl.exp(log_sum - student_centre)
        student_sum_tempered = tl.exp(log_sum_tempered - student_centre * inverse_temperature)
    if READ_TEACHER:
        log_sum = tl.load(statistics + all_rows + row, mask=row_mask, other=0.0)
        log_sum_tempered = tl.load(statistics + 3 * all_rows + row, mask=row_mask, other=0.0)
        teacher_centre = tl.where(temperature < 1.0, log_sum_tempered * temperature, log_sum)
        teacher_sum = tl.exp(log_sum - teacher_centre)
        teacher_sum_tempered = tl.exp(log_sum_tempered - teacher_centre * inverse_temperature)

    label = zeros.to(tl.int64)
    label_b = label
    weight = zeros
    weight_b = zeros
    mass = zeros
    if (CE_STUDENT or CE_TEACHER) and (LABELS == 1 or LABELS == 2):
        label = tl.load(target + target_rows, mask=row_mask, other=0)
        weight = tl.where(label != ignore_index, 1.0, zeros)
        weight = tl.where((label == ignore_index) | ((label >= 0) & (label < classes)), weight, float("nan"))
        if LABELS == 2:
            target_b_rows = pixel_offsets(pixel, width, strides[3], CLASSES_CONTIGUOUS & 8, FLAT, ALIGN)
            label_b = tl.load(target_b + sample * strides[3][0] + target_b_rows, mask=row_mask, other=0)
            weight_b = tl.where(label_b != ignore_index, 1.0 - mix, zeros)
            known = (label_b == ignore_index) | ((label_b >= 0) & (label_b < classes))
            weight_b = tl.where(known, weight_b, float("nan"))
            weight = mix * weight
        mass = weight + weight_b

    # The stored log-sum-exps carry an error of half a unit in the last place of their size. Rows in one tile are summed
    # anew at no cost in memory traffic; longer ones only where that error shows, or where sum_k t_k is needed.
    if not SINGLE:
        largest = tl.max(tl.where(row_mask, tl.maximum(tl.abs(student_centre), tl.abs(teacher_centre)), 0.0), axis=0)
        if (largest > 16.0) | (LABELS == 3):
            student_sum = zeros
            student_sum_tempered = zeros
            teacher_sum = zeros
            teacher_sum_tempered = zeros
            for first_class in range(0, classes, BLOCK_CLASSES):
                here = first_class + column
                mask = row_mask[:, None] & (here < class_end)[None, :]
                if READ_STUDENT:
                    offset = tile_offsets(student_rows, here, strides[0], CLASSES_CONTIGUOUS & 1, ALIGN)
                    z_student = tl.load(student + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
                    tempered, plain = _exponentials(z_student - student_centre[:, None], inverse_temperature, POWER)
                    student_sum_tempered += tl.sum(tempered, axis=1)
                    student_sum += tl.sum(plain, axis=1)
                if READ_TEACHER:
                    offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
                    z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
                    tempered, plain = _exponentials(z_teacher - teacher_centre[:, None], inverse_temperature, POWER)
                    teacher_sum_tempered += tl.sum(tempered, axis=1)
                    teacher_sum += tl.sum(plain, axis=1)
                if DENSE and LABELS == 3:
                    offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
                    dense = _label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
                    mass += tl.sum(dense, axis=1)

    for first_class in range(0, BLOCK_CLASSES if SINGLE else classes, BLOCK_CLASSES):
        here = first_class + column
        mask = row_mask[:, None] & (here < class_end)[None, :]
        if READ_STUDENT:
            offset = tile_offsets(student_rows, here, strides[0], CLASSES_CONTIGUOUS & 1, ALIGN)
            z_student = tl.load(student + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            z_student -= student_centre[:, None]
            student_tempered, student_plain = _exponentials(z_student, inverse_temperature, POWER)
            if SINGLE:
                student_sum_tempered = tl.sum(student_tempered, axis=1)
                student_sum = tl.sum(student_plain, axis=1)
            student_tempered = student_tempered * (1.0 / student_sum_tempered)[:, None]
        if READ_TEACHER:
            offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
            z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            z_teacher -= teacher_centre[:, None]
            teacher_tempered, teacher_plain = _exponentials(z_teacher, inverse_temperature, POWER)
            if SINGLE:
                teacher_sum_tempered = tl.sum(teacher_tempered, axis=1)
                teacher_sum = tl.sum(teacher_plain, axis=1)
            teacher_tempered = teacher_tempered * (1.0 / teacher_sum_tempered)[:, None]
        label_here = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], ACCUMULATE)
        if DENSE:
            offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
            label_here = _label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
            if LABELS == 3:
                if SINGLE:
                    mass = tl.sum(label_here, axis=1)
            else:
                label_here *= mass[:, None]
        if LABELS == 1 or LABELS == 2:
            sharp = (weight * (1.0 - smoothing))[:, None]
            label_here += tl.where(here[None, :] == label[:, None], sharp, 0.0)
            if LABELS == 2:
                sharp = (weight_b * (1.0 - smoothing))[:, None]
                label_here += tl.where(here[None, :] == label_b[:, None], sharp, 0.0)
        if NEED_STUDENT:
            gradient = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], ACCUMULATE)
            if CE_STUDENT:
                probability = student_plain * (1.0 / student_sum)[:, None]
                gradient += grad_ce_student[:, None] * (probability * mass[:, None] - label_here)
            if KD_STUDENT:
                gradient += grad_kd[:, None] * (student_tempered - teacher_tempered)
            offset = tile_offsets(student_gradient_rows, here, strides[4], CLASSES_CONTIGUOUS & 16, ALIGN)
            tl.store(student_gradient + offset, gradient.to(student_gradient.dtype.element_ty), mask=mask)
        if NEED_TEACHER:
            gradient = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], ACCUMULATE)
            if CE_TEACHER:
                probability = teacher_plain * (1.0 / teacher_sum)[:, None]
                gradient += grad_ce_teacher[:, None] * (probability * mass[:, None] - label_here)
            if KD_TEACHER:
                # log p_t - log p_s less its mean under p_t, where constants of the row cancel
                log_ratio = (z_teacher - z_student) * inverse_temperature
                if SINGLE:
                    product = tl.where(teacher_tempered == 0.0, 0.0, teacher_tempered * log_ratio)
                    mean = tl.sum(product, axis=1)
                else:
                    mean = tl.load(losses + 2 * all_rows + row, mask=row_mask, other=0.0)
                    mean = mean * (inverse_temperature * inverse_temperature)
                    mean += tl.log(teacher_sum_tempered / student_sum_tempered)
                excess = log_ratio - mean[:, None]
                kd = grad_kd[:, None] * teacher_tempered * excess
                gradient += tl.where(teacher_tempered == 0.0, 0.0, kd)
            offset = tile_offsets(teacher_gradient_rows, here, strides[5], CLASSES_CONTIGUOUS & 32, ALIGN)
            tl.store(teacher_gradient + offset, gradient.to(teacher_gradient.dtype.element_ty), mask=mask)


@triton.jit
def _factor(parts, ACCUMULATE: tl.constexpr):
    """high + low of one scale."""
    return tl.full([], parts[0], ACCUMULATE) + parts[1]


@triton.jit(do_not_specialize=["all_rows", "ignore_index"])
def _gradient_kernel(
    students,  # heads x (N, K, H, W)
    teachers,  # heads x (N, K, H, W)
    targets,  # heads x (N, H, W) or (N, K, H, W)
    targets_b,  # heads x (N, H, W)
    student_gradients,  # heads x (N, K, H, W)
    teacher_gradients,  # heads x (N, K, H, W)
    strides,  # heads x the six tensors above x (sample, image row, pixel, class)
    samples,  # heads x N
    classes,  # heads x K
    pixels,  # heads x H * W
    widths,  # heads x W
    statistics,  # (4, R)
    losses,  # (4, R)
    upstream,  # three tensors: d / d ce_student, ce_teacher, kd
    head_strides,  # of the three, in elements
    row_strides,  # of the three, in elements
    scales,  # heads x three x (high, low): their sum is the factor
    inverse_valid,  # (heads,)
    all_rows,  # R
    mix: tl.float64,
    smoothing: tl.float64,
    ignore_index,
    temperature: tl.float64,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    SINGLE: tl.constexpr,
    CLASSES_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    HAS_INVERSE_VALID: tl.constexpr,
    NEED_STUDENT: tl.constexpr,
    NEED_TEACHER: tl.constexpr,
    CE_STUDENT: tl.constexpr,
    CE_TEACHER: tl.constexpr,
    KD_STUDENT: tl.constexpr,
    KD_TEACHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (head, sample, tile of rows)."""
    program = tl.program_id(0)
    mix = tl.full([], mix, ACCUMULATE)
    smoothing = tl.full([], smoothing, ACCUMULATE)
    temperature = tl.full([], temperature, ACCUMULATE)
    all_rows = all_rows.to(tl.int64)
    first_row = all_rows * 0
    for index in tl.static_range(HEADS):
        tiles = tl.cdiv(pixels[index], BLOCK_ROWS[index])
        if (program >= 0) & (program < samples[index] * tiles):
            valid = tl.full([], 1.0, ACCUMULATE)
            if HAS_INVERSE_VALID:
                valid = tl.load(inverse_valid + index)
            _gradient_tile(
                students[index], teachers[index], targets[index], targets_b[index], student_gradients[index],
                teacher_gradients[index], strides[index], statistics + first_row, losses + first_row,
                (
                    upstream[0] + index * head_strides[0] + first_row * row_strides[0],
                    upstream[1] + index * head_strides[1] + first_row * row_strides[1],
                    upstream[2] + index * head_strides[2] + first_row * row_strides[2],
                ),
                row_strides,
                (
                    _factor(scales[index][0], ACCUMULATE) * valid,
                    _factor(scales[index][1], ACCUMULATE) * valid,
                    _factor(scales[index][2], ACCUMULATE),
                ),
                all_rows, program // tiles, (program % tiles) * BLOCK_ROWS[index],
                classes[index], pixels[index], widths[index], mix, smoothing, ignore_index, temperature,
                BLOCK_ROWS[index], BLOCK_CLASSES[index], SINGLE[index], CLASSES_CONTIGUOUS[index], FLAT[index],
                ALIGN[index], WIDE, HAS_TEACHER, LABELS, SMOOTH, POWER, NEED_STUDENT, NEED_TEACHER,
                CE_STUDENT, CE_TEACHER, KD_STUDENT, KD_TEACHER, ACCUMULATE,
            )  # fmt: skip
        program -= samples[index] * tiles
        first_row += tl.full([], samples[index], tl.int64) * pixels[index]


@functools.lru_cache(maxsize=256)
def _plan(
    heads: tuple[tuple[Geometry, ...], ...],  # per head: the tensors of the launch
    channelled: tuple[bool, ...],  # which of them have a class axis
    element_size: int,  # bytes
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Programs of each head, arguments (strides, samples, classes, pixels, widths) and constants of a launch."""
    layouts = [layout_of(tensors, channelled, merge_samples=True) for tensors in heads]
    classes = tuple(tensors[0][0][1] for tensors in heads)
    blocks = [
        _logits_tile(width, layout.pixels, layout.channels_contiguous[0], element_size)
        for width, layout in zip(classes, layouts, strict=True)
    ]
    programs = tuple(
        layout.samples * triton.cdiv(layout.pixels, block[0]) for layout, block in zip(layouts, blocks, strict=True)
    )
    arguments = (
        tuple(layout.strides for layout in layouts),
        tuple(layout.samples for layout in layouts),
        classes,
        tuple(layout.pixels for layout in layouts),
        tuple(layout.width for layout in layouts),
    )
    single = [width <= block[1] for width, block in zip(classes, blocks, strict=True)]
    constants = {
        "HEADS": len(heads),
        "BLOCK_ROWS": tuple(block[0] for block in blocks),
        "BLOCK_CLASSES": tuple(block[1] for block in blocks),
        "SINGLE": tuple(single),
        "CLASSES_CONTIGUOUS": tuple(layout.contiguity for layout in layouts),
        "FLAT": tuple(layout.flat for layout in layouts),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "WIDE": any(layout.wide for layout in layouts),
        "num_warps": max(_num_warps(*block, whole) for block, whole in zip(blocks, single, strict=True)),
    }
    return programs, arguments, constants


def _label_kind(targets: Sequence[Tensor], targets_b: Sequence[Tensor]) -> int:
    if not targets:
        return _NONE
    if targets[0].dtype.is_floating_point:
        return _PROBABILITIES
    return _TWO_INDICES if targets_b else _INDICES


def _row_count(logits: Tensor) -> int:
    return logits.shape[0] * logits.shape[2:].numel()


class _Heads:
    """The tensors of one launch, with absent ones replaced by what may stand in their place unread."""

    def __init__(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        targets: Sequence[Tensor],
        targets_b: Sequence[Tensor],
        part: slice,
    ) -> None:
        self.students = tuple(students[part])
        self.teachers = tuple(teachers[part]) if teachers else self.students
        self.labels = _label_kind(targets, targets_b)
        self.targets = tuple(targets[part]) if targets else self.students
        self.targets_b = tuple(targets_b[part]) if targets_b else self.targets
        self.channelled = (True, True, self.labels in (_NONE, _PROBABILITIES), self.labels in (_NONE, _PROBABILITIES))

    def plan(self, *gradients: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
        """``_plan`` of the inputs and further tensors of the logits' shape."""
        columns = (self.students, self.teachers, self.targets, self.targets_b, *gradients)
        heads = tuple(zip(*[geometries(column) for column in columns], strict=True))
        return _plan(heads, self.channelled + (True,) * len(gradients), self.students[0].element_size())


def forward(
    students: Sequence[Tensor],  # heads x (N, K[, H[, W]])
    teachers: Sequence[Tensor],  # the same shapes, or empty
    targets: Sequence[Tensor],  # heads x (N[, H[, W]]) int64, or probabilities of the logits' shape, or empty
    targets_b: Sequence[Tensor],  # second labels of a mix, or empty
    mix: float,  # weight of the first labels
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (4, R), statistics (4, R) and 1 / valid rows of each head.

    One launch for 8 heads; labels of heads with more than 8192 rows are counted by a second, small one.
    """
    first = students[0]
    device = first.device
    dtype = accumulate_dtype(first.dtype)
    accumulate = triton_accumulate_dtype(first.dtype)
    counts = [_row_count(student) for student in students]
    rows = sum(counts)
    losses = torch.empty((4, rows), dtype=dtype, device=device)
    statistics = torch.empty((4, rows), dtype=dtype, device=device)
    # A head without rows has no program that could write its 0.
    allocate = torch.empty if all(counts) else torch.zeros
    inverse_valid = allocate(len(students), dtype=dtype, device=device)
    begin = 0
    for part in chunks(len(students)):
        heads = _Heads(students, teachers, targets, targets_b, part)
        programs, arguments, constants = heads.plan()
        by_label = heads.labels in (_INDICES, _TWO_INDICES)
        count_here = not by_label or max(counts[part]) <= _COUNT_LIMIT
        partials = losses if count_here else torch.empty(sum(programs), dtype=dtype, device=device)
        launch(
            _forward_kernel, sum(programs), device,
            heads.students, heads.teachers, heads.targets, heads.targets_b, *arguments,
            losses[:, begin:] if begin else losses, statistics[:, begin:] if begin else statistics,
            tail(inverse_valid, part.start), partials, rows, mix, label_smoothing, ignore_index, temperature,
            HAS_TEACHER=bool(teachers), LABELS=heads.labels, SMOOTH=label_smoothing != 0.0,
            POWER=_plain_power(temperature), COUNT_HERE=count_here, COUNT_BLOCK=_COUNT_STEP, ACCUMULATE=accumulate,
            **constants,
        )  # fmt: skip
        if not count_here:
            ends = tuple(itertools.accumulate(programs))
            launch(
                _count_kernel, len(programs), device, partials, ends, tail(inverse_valid, part.start),
                HEADS=len(programs), BLOCK=_COUNT_STEP, ACCUMULATE=accumulate, num_warps=4,
            )  # fmt: skip
        begin += sum(counts[part])
    return losses, statistics, inverse_valid


def _high_and_low(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``value`` to 48 bits: floats inside a tuple reach a kernel as float32."""
    high = float(np.float32(value))
    return high, value - high


def backward(
    grads: Sequence[Tensor],  # three 1-D tensors: upstream gradients of ce_student, ce_teacher, kd
    grad_head_stride: int,  # elements
    grad_row_stride: int,  # elements
    scales: Sequence[float],  # (3 * heads,), 0 where a term is absent
    inverse_valid: Tensor | None,  # (heads,)
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    statistics: Tensor,  # (4, R)
    losses: Tensor,  # (4, R)
    kd_to_teacher: bool,
    need_student: bool,
    need_teacher: bool,
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Gradients of the student and teacher logits, in their dtype and memory format; one launch for 8 heads."""
    student_gradients = [torch.empty_like(student) for student in students] if need_student else None
    teacher_gradients = [torch.empty_like(teacher) for teacher in teachers] if need_teacher else None
    if not (need_student or need_teacher):
        return None, None
    first = students[0]
    has_ce_student, has_ce_teacher, has_kd = (any(scales[term::3]) for term in range(3))
    steps = [grad.stride(0) for grad in grads]
    begin = 0
    for part in chunks(len(students)):
        heads = _Heads(students, teachers, targets, targets_b, part)
        # Where one side needs no gradient, the other's stands in its place unwritten.
        student_part = tuple((student_gradients or teacher_gradients or [])[part])
        teacher_part = tuple((teacher_gradients or student_gradients or [])[part])
        programs, arguments, constants = heads.plan(student_part, teacher_part)
        launch(
            _gradient_kernel, sum(programs), first.device,
            heads.students, heads.teachers, heads.targets, heads.targets_b, student_part, teacher_part, *arguments,
            statistics[:, begin:] if begin else statistics, losses[:, begin:] if begin else losses,
            tuple([tail(grad, part.start * grad_head_stride + begin * grad_row_stride) for grad in grads]),
            tuple([grad_head_stride * step for step in steps]), tuple([grad_row_stride * step for step in steps]),
            tuple(
                [
                    tuple([_high_and_low(scale) for scale in scales[3 * head : 3 * head + 3]])
                    for head in range(part.start, part.stop)
                ]
            ),
            statistics if inverse_valid is None else tail(inverse_valid, part.start),
            statistics.shape[1], mix, label_smoothing, ignore_index, temperature,
            HAS_TEACHER=bool(teachers), LABELS=heads.labels, SMOOTH=label_smoothing != 0.0,
            POWER=_plain_power(temperature), HAS_INVERSE_VALID=inverse_valid is not None,
            NEED_STUDENT=need_student, NEED_TEACHER=need_teacher,
            CE_STUDENT=need_student and has_ce_student, CE_TEACHER=need_teacher and has_ce_teacher,
            KD_STUDENT=need_student and has_kd, KD_TEACHER=need_teacher and has_kd and kd_to_teacher,
            ACCUMULATE=triton_accumulate_dtype(first.dtype), **constants,
        )  # fmt: skip
        begin += sum(_row_count(student) for student in heads.students)
    return student_gradients, teacher_gradients
