"""Gradients of rows of class logits from the saved log-sums, in tiles of (rows, classes)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import aligned, pixel_offsets, tile_offsets
from .logits_math import exponentials, label_weights


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
                    tempered, plain = exponentials(z_student - student_centre[:, None], inverse_temperature, POWER)
                    student_sum_tempered += tl.sum(tempered, axis=1)
                    student_sum += tl.sum(plain, axis=1)
                if READ_TEACHER:
                    offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
                    z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
                    tempered, plain = exponentials(z_teacher - teacher_centre[:, None], inverse_temperature, POWER)
                    teacher_sum_tempered += tl.sum(tempered, axis=1)
                    teacher_sum += tl.sum(plain, axis=1)
                if DENSE and LABELS == 3:
                    offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
                    dense = label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
                    mass += tl.sum(dense, axis=1)

    for first_class in range(0, BLOCK_CLASSES if SINGLE else classes, BLOCK_CLASSES):
        here = first_class + column
        mask = row_mask[:, None] & (here < class_end)[None, :]
        if READ_STUDENT:
            offset = tile_offsets(student_rows, here, strides[0], CLASSES_CONTIGUOUS & 1, ALIGN)
            z_student = tl.load(student + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            z_student -= student_centre[:, None]
            student_tempered, student_plain = exponentials(z_student, inverse_temperature, POWER)
            if SINGLE:
                student_sum_tempered = tl.sum(student_tempered, axis=1)
                student_sum = tl.sum(student_plain, axis=1)
            student_tempered = student_tempered * (1.0 / student_sum_tempered)[:, None]
        if READ_TEACHER:
            offset = tile_offsets(teacher_rows, here, strides[1], CLASSES_CONTIGUOUS & 2, ALIGN)
            z_teacher = tl.load(teacher + offset, mask=mask, other=float("-inf")).to(ACCUMULATE)
            z_teacher -= teacher_centre[:, None]
            teacher_tempered, teacher_plain = exponentials(z_teacher, inverse_temperature, POWER)
            if SINGLE:
                teacher_sum_tempered = tl.sum(teacher_tempered, axis=1)
                teacher_sum = tl.sum(teacher_plain, axis=1)
            teacher_tempered = teacher_tempered * (1.0 / teacher_sum_tempered)[:, None]
        label_here = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], ACCUMULATE)
        if DENSE:
            offset = tile_offsets(target_rows, here, strides[2], CLASSES_CONTIGUOUS & 4, ALIGN)
            label_here = label_weights(target, offset, mask, smoothing, classes, LABELS, ACCUMULATE)
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
def gradient_kernel(
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
                ALIGN[index], WIDE, LABELS, SMOOTH, POWER, NEED_STUDENT, NEED_TEACHER,
                CE_STUDENT, CE_TEACHER, KD_STUDENT, KD_TEACHER, ACCUMULATE,
            )  # fmt: skip
        program -= samples[index] * tiles
        first_row += tl.full([], samples[index], tl.int64) * pixels[index]
