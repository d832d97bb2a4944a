"""Losses and softmax statistics of fine pixels for ``logit_maps``: an online softmax over blocks of classes.

A tile is (cells, pixels, classes): some fine pixels of one row in each of a row of neighbouring cells, so that corners are
read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logit_maps_cells import between, cell_begin, cell_slope, dense_sum, exponentials, label_and_weight, row_of_cells


@triton.jit
def _label_logit(
    top,  # pointer to the low-resolution row above
    bottom,  # to the one below
    place,  # (cells, pixels) offsets of the left corners' logits of the label
    following,  # from a left to a right corner
    mask,
    vertical,
    across,  # (cells, pixels)
):
    """The interpolated logit of each pixel's label."""
    left = between(tl.load(top + place, mask=mask, other=0.0), tl.load(bottom + place, mask=mask, other=0.0), vertical)
    top += following
    bottom += following
    right = between(tl.load(top + place, mask=mask, other=0.0), tl.load(bottom + place, mask=mask, other=0.0), vertical)
    return between(left, right, across)


@triton.jit(
    do_not_specialize=["samples", "classes", "height", "width", "full_height", "full_width", "most", "ignore_index"]
)
def statistics_kernel(
    packed,  # (N, h, w + 2, networks, stride)
    targets,  # (N, H, W)
    class_weights,  # (K,)
    dense,  # (stride,) s / K * w_k, 0 beyond the classes
    losses,  # three of (N, H, W): ce_student, ce_teacher, kd
    statistics,  # (7, N, H, W): of the student, then of the teacher: maximum, 1 / sum exp(z - maximum), the same tempered;
    # mean log ratio of the teacher's tempered exponentials to the student's
    partials,  # (4, programs) sums of the losses and of the pixels' weights
    samples,  # N
    classes,  # K
    stride,  # classes in ``packed``
    height,  # h
    width,  # w
    full_height,  # H
    full_width,  # W
    most,  # fine pixels in the longest row of a cell
    smoothing: tl.float64,
    ignore_index,
    temperature: tl.float64,
    CELLS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    SUMS: tl.constexpr,
    LOSSES: tl.constexpr,
    STATISTICS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (sample, row of cells, strip of cells)."""
    smoothing = tl.full([], smoothing, ACCUMULATE)
    temperature = tl.full([], 1.0 if POWER == 1 else temperature, ACCUMULATE)
    inverse_temperature = 1.0 / temperature
    if SINGLE:
        stride = BLOCK
    program = tl.program_id(0)
    strips = tl.cdiv(width + 1, CELLS)
    cell = (program % strips) * CELLS + tl.arange(0, CELLS)
    row = (program // strips) % (height + 1)
    sample = (program // strips // (height + 1)).to(tl.int64)

    begin = cell_begin(cell, width, full_width)
    end = cell_begin(cell + 1, width, full_width)
    start, step = cell_slope(cell, begin, width, full_width, ACCUMULATE)
    begin = begin[:, None]
    end = end[:, None]
    NETWORKS: tl.constexpr = 2 if HAS_TEACHER else 1
    following = NETWORKS * stride
    # Cells right of the border are walked in vain.
    corner = (tl.minimum(cell, width) * following)[:, None]
    row_size = (width + 2).to(tl.int64) * following
    above = packed + (sample * height + tl.maximum(row - 1, 0)) * row_size
    below = packed + (sample * height + tl.minimum(row, height - 1)) * row_size
    statistics_stride = samples.to(tl.int64) * full_height * full_width
    dense_mass = dense_sum(dense, classes, SMOOTH, BLOCK, ACCUMULATE)
    column = tl.arange(0, BLOCK)

    none = tl.zeros([CELLS, PIXELS], ACCUMULATE)
    ce_student_sum = none
    ce_teacher_sum = none
    kd_sum = none
    weight_sum = none
    first_y = cell_begin(row, height, full_height)
    vertical_start, vertical_step = cell_slope(row, first_y, height, full_height, ACCUMULATE)
    for y in range(first_y, cell_begin(row + 1, height, full_height)):
        vertical = vertical_start + vertical_step * (y - first_y).to(ACCUMULATE)
        for first_pixel in range(0, most, PIXELS):
            pixel = first_pixel + tl.arange(0, PIXELS)[None, :]
            inside = begin + pixel < end
            across = tl.where(inside, start[:, None] + step[:, None] * pixel, 0.0)
            place = (sample * full_height + y) * full_width + begin + pixel
            # Finite, so that classes that are all -inf are no NaN beside it.
            student_max = none - 3e38
            teacher_max = student_max
            student_sum = none
            student_sum_tempered = none
            teacher_sum = none
            teacher_sum_tempered = none
            # sum_k exp(teacher / T) * (teacher - student), of relative logits
            cross = none
            # sum_k w_k and sum_k w_k z_k with the weights of label smoothing, of relative logits
            mass = none
            student_dot = none
            teacher_dot = none
            for first_class in range(0, BLOCK if SINGLE else classes, BLOCK):
                here = first_class + column
                is_class = (here < classes)[None, :]
                here_corner = corner + here[None, :]
                left, right = row_of_cells(above, below, here_corner, following, is_class, vertical)
                z_student = between(left[:, None, :], right[:, None, :], across[:, :, None])
                maximum = tl.maximum(student_max, tl.max(z_student, axis=2))
                student_shift = student_max - maximum
                student_max = maximum
                z_student -= maximum[:, :, None]
                tempered, plain = exponentials(z_student, inverse_temperature, POWER)
                rescale_tempered, rescale = exponentials(student_shift, inverse_temperature, POWER)
                student_sum_tempered = student_sum_tempered * rescale_tempered + tl.sum(tempered, axis=2)
                student_sum = student_sum * rescale + tl.sum(plain, axis=2)
                teacher_shift = student_shift
                z_teacher = z_student
                if HAS_TEACHER:
                    left, right = row_of_cells(
                        above + stride, below + stride, here_corner, following, is_class, vertical
                    )
                    z_teacher = between(left[:, None, :], right[:, None, :], across[:, :, None])
                    maximum = tl.maximum(teacher_max, tl.max(z_teacher, axis=2))
                    teacher_shift = teacher_max - maximum
                    teacher_max = maximum
                    z_teacher -= maximum[:, :, None]
                    tempered, plain = exponentials(z_teacher, inverse_temperature, POWER)
                    rescale_tempered, rescale = exponentials(teacher_shift, inverse_temperature, POWER)
                    cross += teacher_sum_tempered * (teacher_shift - student_shift)
                    # No class without a probability counts, also where both logits are -inf.
                    difference = tl.where(tempered == 0.0, 0.0, z_teacher - z_student)
                    cross = cross * rescale_tempered + tl.sum(tempered * difference, axis=2)
                    teacher_sum_tempered = teacher_sum_tempered * rescale_tempered + tl.sum(tempered, axis=2)
                    teacher_sum = teacher_sum * rescale + tl.sum(plain, axis=2)
                if SMOOTH and HAS_TARGETS:
                    weights = tl.load(dense + here)[None, None, :]
                    student_dot += mass * student_shift + tl.sum(weights * z_student, axis=2)
                    if HAS_TEACHER:
                        teacher_dot += mass * teacher_shift + tl.sum(weights * z_teacher, axis=2)
                    mass += tl.sum(weights, axis=2)
            mean = none
            kd = none
            if HAS_TEACHER:
                mean = cross / teacher_sum_tempered * inverse_temperature
                # One logarithm of the ratio: the difference of two would lose the digits of a small divergence.
                kd = temperature * temperature * (mean - tl.log(teacher_sum_tempered / student_sum_tempered))
            if STATISTICS:
                to = statistics + place
                tl.store(to, student_max, mask=inside)
                tl.store(to + statistics_stride, 1.0 / student_sum, mask=inside)
                if POWER != 1:
                    tl.store(to + 2 * statistics_stride, 1.0 / student_sum_tempered, mask=inside)
                if HAS_TEACHER:
                    tl.store(to + 3 * statistics_stride, teacher_max, mask=inside)
                    tl.store(to + 4 * statistics_stride, 1.0 / teacher_sum, mask=inside)
                    if POWER != 1:
                        tl.store(to + 5 * statistics_stride, 1.0 / teacher_sum_tempered, mask=inside)
                    tl.store(to + 6 * statistics_stride, mean, mask=inside)
            if SUMS or LOSSES:
                ce_student = none
                ce_teacher = none
                if HAS_TARGETS:
                    label, kept, weight = label_and_weight(
                        targets, class_weights, place, inside, classes, ignore_index, HAS_WEIGHTS, ACCUMULATE
                    )
                    known = kept & (weight == weight)
                    label_corner = corner + label
                    sharp = (1.0 - smoothing) * weight
                    z_student = _label_logit(above, below, label_corner, following, known, vertical, across)
                    ce_student = (sharp + dense_mass) * tl.log(student_sum) - sharp * (z_student - student_max)
                    ce_student = tl.where(kept, ce_student - student_dot, 0.0)
                    if HAS_TEACHER:
                        z_teacher = _label_logit(
                            above + stride, below + stride, label_corner, following, known, vertical, across
                        )
                        ce_teacher = (sharp + dense_mass) * tl.log(teacher_sum) - sharp * (z_teacher - teacher_max)
                        ce_teacher = tl.where(kept, ce_teacher - teacher_dot, 0.0)
                    weight_sum += weight
                if LOSSES:
                    tl.store(losses[0] + place, ce_student, mask=inside)
                    tl.store(losses[1] + place, ce_teacher, mask=inside)
                    tl.store(losses[2] + place, kd, mask=inside)
                ce_student_sum += ce_student
                ce_teacher_sum += ce_teacher
                kd_sum += tl.where(inside, kd, 0.0)
    if SUMS:
        partials += tl.program_id(0)
        programs = tl.num_programs(0)
        tl.store(partials, tl.sum(ce_student_sum))
        tl.store(partials + programs, tl.sum(ce_teacher_sum))
        tl.store(partials + 2 * programs, tl.sum(kd_sum))
        tl.store(partials + 3 * programs, tl.sum(weight_sum))
