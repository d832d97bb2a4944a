"""Losses and statistics of rows of class logits: an online softmax over tiles of (rows, classes)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import aligned, pixel_offsets, tile_offsets
from .logits_math import exponentials, label_weights


@triton.jit
def _centre(maximum):
    """What to subtract from logits whose maximum so far is ``maximum``: 0 while every class was masked (-inf)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _shift(old_maximum, new_maximum):
    """Change of the centre, to be added to relative logits; 0 where there was no class before."""
    return tl.where(old_maximum == float("-inf"), 0.0, old_maximum - _centre(new_maximum))


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
        tempered, plain = exponentials(z_student, inverse_temperature, POWER)
        if SINGLE:
            student_sum_tempered = tl.sum(tempered, axis=1)
            student_sum = tl.sum(plain, axis=1)
        else:
            rescale_tempered, rescale = exponentials(student_shift, inverse_temperature, POWER)
            student_sum_tempered = student_sum_tempered * rescale_tempered + tl.sum(tempered, axis=1)
            student_sum = student_sum * rescale + tl.sum(plain, axis=1)
        if HAS_TEACHER:
            offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
            z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            maximum = tl.maximum(teacher_max, tl.max(z_teacher, axis=1))
            z_teacher -= _centre(maximum)[:, None]
            teacher_shift = _shift(teacher_max, maximum)
            teacher_max = maximum
            tempered, plain = exponentials(z_teacher, inverse_temperature, POWER)
            # A class the teacher excludes contributes 0, whatever the student says.
            product = tl.sum(tl.where(tempered == 0.0, 0.0, tempered * (z_teacher - z_student)), axis=1)
            if SINGLE:
                cross = product
                teacher_sum_tempered = tl.sum(tempered, axis=1)
                teacher_sum = tl.sum(plain, axis=1)
            else:
                rescale_tempered, rescale = exponentials(teacher_shift, inverse_temperature, POWER)
                moved = rescale_tempered * (cross + teacher_sum_tempered * (teacher_shift - student_shift))
                cross = tl.where(rescale_tempered == 0.0, 0.0, moved) + product
                teacher_sum_tempered = teacher_sum_tempered * rescale_tempered + tl.sum(tempered, axis=1)
                teacher_sum = teacher_sum * rescale + tl.sum(plain, axis=1)
        if LABELS == 3 or (SMOOTH and LABELS != 0):
            offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
            weight = label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
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
def forward_kernel(
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
def count_kernel(
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
