"""Low-resolution gradients of the losses of ``logit_maps``, and the losses themselves where a pixel's classes fit one tile.

A tile is (cells, classes): a row of neighbouring cells, each of which walks its own fine pixels, with the four corners'
gradients in registers. A program walks down a band of rows of cells, so that the lower corners of a cell become the upper
ones of the next. The cells at the edge of a tile and of a band are walked by both neighbours: recomputing them costs less
than adding partial sums through memory, and every low-resolution gradient is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logit_maps_cells import between, cell_begin, cell_slope, dense_sum, exponentials, label_and_weight, row_of_cells


@triton.jit
def _spread(corners, gradient, weights):
    """Adds the gradient of one pixel to those of its four corners (two above, two below)."""
    return (
        corners[0] + weights[0][:, None] * gradient,
        corners[1] + weights[1][:, None] * gradient,
        corners[2] + weights[2][:, None] * gradient,
        corners[3] + weights[3][:, None] * gradient,
    )


@triton.jit
def _store(
    gradient,  # pointer to the row above
    place,  # (cells, classes) offsets of the columns right of the cells
    mask,
    corners,
    scale,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a row: a column gets the right end of its own cell and the left end of the next."""
    following = tl.minimum(tl.arange(0, CELLS) + 1, CELLS - 1)
    index = tl.broadcast_to(following[:, None], [CELLS, BLOCK])
    value = scale * (corners[1] + tl.gather(corners[0], index, axis=0))
    tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(
    left,  # (cells, classes) logits at the cells' left ends
    right,  # (cells, classes) those at the right ends
    across,  # (cells,) position in the cell
    statistics,  # pointers to the pixels' maxima, (cells,); behind them 1 / sum exp(z - maximum), and the same tempered
    statistics_stride,
    inside,  # (cells,)
    inverse_temperature,
    SINGLE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Logits relative to the maximum; exp(z / T), exp(z); their sums; and the sums' inverses.

    Sums over several tiles are not computed here: their inverses are read.
    """
    z = between(left, right, across[:, None])
    if SINGLE:
        z -= tl.max(z, axis=1)[:, None]
    else:
        # So large that no class has a probability where there is no pixel, and finite.
        z -= tl.load(statistics, mask=inside, other=1e38)[:, None]
    tempered, plain = exponentials(z, inverse_temperature, POWER)
    if SINGLE:
        total_tempered = tl.sum(tempered, axis=1)
        total = tl.sum(plain, axis=1)
        scale_tempered = 1.0 / total_tempered
        scale = 1.0 / total
    else:
        total_tempered = tl.zeros_like(across)
        total = total_tempered
        scale = tl.load(statistics + statistics_stride, mask=inside, other=0.0)
        scale_tempered = scale
        if POWER != 1:
            scale_tempered = tl.load(statistics + 2 * statistics_stride, mask=inside, other=0.0)
    return z, tempered, plain, total_tempered, total, scale_tempered, scale


@triton.jit
def _folded(values, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of four neighbouring classes, (cells, classes / 4): a thread has them, and few registers then keep a total."""
    return tl.sum(tl.reshape(values, [CELLS, BLOCK // 4, 4]), axis=2)


@triton.jit
def _product(share, z):
    """share * z, 0 where a class has no share, also where its logit is -inf or NaN."""
    return tl.where(share == 0.0, 0.0, share * z)


@triton.jit
def _labels(
    label,  # (cells,)
    weight,  # (cells,)
    class_numbers,  # (classes,)
    dense_weights,  # (classes,) s / K * w_k
    dense_mass,  # their sum over all classes
    smoothing,
    SMOOTH: tl.constexpr,
):
    """The weighted labels t_k of the pixels, (cells, classes), and their sums."""
    mass = weight * (1.0 - smoothing)
    target = tl.where(class_numbers[None, :] == label[:, None], mass[:, None], 0.0)
    if SMOOTH:
        # 0 where the label is ignored, NaN where it is no class.
        counted = tl.where(weight != weight, weight, tl.where(label >= 0, 1.0, 0.0))
        mass += dense_mass * counted
        target += dense_weights[None, :] * counted[:, None]
    return target, mass


@triton.jit(
    do_not_specialize=[
        "samples",
        "classes",
        "height",
        "width",
        "full_height",
        "full_width",
        "band",
        "most",
        "ignore_index",
    ]
)
def gradient_kernel(
    packed,  # (N, h, w + 2, networks, stride)
    targets,  # (N, H, W)
    class_weights,  # (K,)
    dense,  # (stride,) s / K * w_k, 0 beyond the classes
    upstream,  # d / d (ce_student, ce_teacher, kd), (N, H, W) each, where losses are per pixel
    statistics,  # (7, N, H, W)
    gradients,  # four of (N, K, h, w): ce_student, kd (student), ce_teacher, kd (teacher); with ``upstream`` the first is
    # the student's, the third the teacher's
    strides,  # of each of the four: (sample, class, row, column)
    partials,  # (4, programs) sums of the losses and of the pixels' weights
    samples,  # N
    classes,  # K
    stride,  # classes in ``packed``
    height,  # h
    width,  # w
    full_height,  # H
    full_width,  # W
    band,  # rows of low-resolution pixels in a program
    most,  # fine pixels in the longest row of a cell
    smoothing: tl.float64,
    ignore_index,
    temperature: tl.float64,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    WIDE: tl.constexpr,  # offsets in a gradient pass 31 bits
    HAS_TEACHER: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    LOSSES: tl.constexpr,
    CE_STUDENT: tl.constexpr,
    KD_STUDENT: tl.constexpr,
    CE_TEACHER: tl.constexpr,
    KD_TEACHER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (sample, band of rows, strip of columns, block of classes)."""
    PRODUCTS: tl.constexpr = not (HAS_WEIGHTS or SMOOTH)
    A: tl.constexpr = CE_STUDENT or (HAS_UPSTREAM and KD_STUDENT)
    B: tl.constexpr = KD_STUDENT and not HAS_UPSTREAM
    C: tl.constexpr = CE_TEACHER or (HAS_UPSTREAM and KD_TEACHER)
    D: tl.constexpr = KD_TEACHER and not HAS_UPSTREAM
    smoothing = tl.full([], smoothing, ACCUMULATE)
    # Told to the compiler, because multiplying by it is work.
    temperature = tl.full([], 1.0 if POWER == 1 else temperature, ACCUMULATE)
    if SINGLE:
        stride = BLOCK
    program = tl.program_id(0)
    blocks = tl.cdiv(classes, BLOCK)
    class_numbers = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    is_class = (class_numbers < classes)[None, :]
    program //= blocks
    strips = tl.cdiv(width, CELLS - 1)
    first_column = (program % strips) * (CELLS - 1)
    program = program // strips
    bands = tl.cdiv(height, band)
    first_row = (program % bands) * band
    sample = (program // bands).to(tl.int64)
    end_row = tl.minimum(first_row + band, height)

    # A lane is the cell left of ``column``.
    lane = tl.arange(0, CELLS)
    column = first_column + lane
    begin = cell_begin(column, width, full_width)
    end = cell_begin(column + 1, width, full_width)
    start, step = cell_slope(column, begin, width, full_width, ACCUMULATE)
    stored = ((lane < CELLS - 1) & (column < width))[:, None] & is_class
    gradient_column = column
    gradient_class = class_numbers
    if WIDE:
        gradient_column = column.to(tl.int64)
        gradient_class = class_numbers.to(tl.int64)
    gradient_place = (gradient_column * strides[3])[:, None] + (gradient_class * strides[1])[None, :]

    row_stride = tl.full([], strides[2], tl.int64)

    NETWORKS: tl.constexpr = 2 if HAS_TEACHER else 1
    following = NETWORKS * stride
    # Cells right of the border are walked in vain.
    corner = (tl.minimum(column, width) * following)[:, None] + class_numbers[None, :]
    row_size = (width + 2).to(tl.int64) * following
    packed += sample * height * row_size
    statistics_stride = samples.to(tl.int64) * full_height * full_width
    dense_mass = dense_sum(dense, classes, SMOOTH, BLOCK, ACCUMULATE)
    dense_weights = tl.zeros([BLOCK], ACCUMULATE)
    if SMOOTH:
        dense_weights += tl.load(dense + class_numbers)

    inverse_temperature = 1.0 / temperature
    zeros = tl.zeros([CELLS], ACCUMULATE)
    none = tl.zeros([CELLS, BLOCK], ACCUMULATE)
    a = (none, none, none, none)
    b = (none, none, none, none)
    c = (none, none, none, none)
    d = (none, none, none, none)
    # sum_k t_k z_k of both networks, and sum_k p_k log(p_k / q_k) but for the sums of exponentials
    few = tl.zeros([CELLS, BLOCK // 4], ACCUMULATE)
    student_label = few
    teacher_label = few
    divergence = few
    log_student = zeros
    log_teacher = zeros
    log_quotient = zeros
    counted = zeros
    for row in range(first_row, end_row + 1):  # of cells: above low-resolution row ``row``
        above = packed + tl.maximum(row - 1, 0) * row_size
        below = packed + tl.minimum(row, height - 1) * row_size
        first_y = cell_begin(row, height, full_height)
        vertical_start, vertical_step = cell_slope(row, first_y, height, full_height, ACCUMULATE)
        for y in range(first_y, cell_begin(row + 1, height, full_height)):
            vertical = vertical_start + vertical_step * (y - first_y).to(ACCUMULATE)
            student_left, student_right = row_of_cells(above, below, corner, following, is_class, vertical)
            teacher_left = none
            teacher_right = none
            if HAS_TEACHER:
                teacher_left, teacher_right = row_of_cells(
                    above + stride, below + stride, corner, following, is_class, vertical
                )
            first_place = (sample * full_height + y) * full_width
            for first_x in range(0, most, 8):
                # Products of eight sums of at most 64 terms do not overflow, and one logarithm serves them all.
                student_product = zeros + 1.0
                teacher_product = student_product
                quotient = student_product
                for x in range(first_x, tl.minimum(first_x + 8, most)):
                    place = begin + x
                    inside = place < end
                    # Between the ends also where there is no pixel: 0 times -inf would be NaN.
                    across = tl.where(inside, start + step * x, 0.5)
                    z, tempered, plain, _, total, scale_tempered, scale = _softmax(
                        student_left, student_right, across, statistics + first_place + place, statistics_stride,
                        inside, inverse_temperature, SINGLE, POWER,
                    )  # fmt: skip
                    kept = inside
                    target = none
                    mass = zeros
                    if HAS_TARGETS:
                        label, kept, weight = label_and_weight(
                            targets + first_place, class_weights, place, inside, classes, ignore_index,
                            HAS_WEIGHTS, ACCUMULATE,
                        )  # fmt: skip
                        target, mass = _labels(
                            label, weight, class_numbers, dense_weights, dense_mass, smoothing, SMOOTH
                        )
                        if LOSSES:
                            counted += weight
                            student_label += _folded(_product(target, z), CELLS, BLOCK)
                            if PRODUCTS:
                                student_product *= tl.where(kept, total, 1.0)
                            else:
                                log_student += tl.where(kept, mass * tl.log(total), 0.0)
                    ce_student = none
                    kd_student = none
                    ce_teacher = none
                    kd_teacher = none
                    if CE_STUDENT:
                        ce_student = plain * (mass * scale)[:, None] - target
                    if HAS_TEACHER:
                        z_t, tempered_t, plain_t, total_tempered_t, total_t, scale_tempered_t, scale_t = _softmax(
                            teacher_left, teacher_right, across, statistics + first_place + place + 3 * statistics_stride,
                            statistics_stride, inside, inverse_temperature, SINGLE, POWER,
                        )  # fmt: skip
                        probability = tempered_t * tl.where(inside, scale_tempered_t, 0.0)[:, None]
                        ratio = (z_t - z) * inverse_temperature
                        if LOSSES:
                            divergence += _folded(_product(probability, ratio), CELLS, BLOCK)
                            quotient *= tl.where(inside, total_tempered_t * scale_tempered, 1.0)
                            if HAS_TARGETS:
                                teacher_label += _folded(_product(target, z_t), CELLS, BLOCK)
                                if PRODUCTS:
                                    teacher_product *= tl.where(kept, total_t, 1.0)
                                else:
                                    log_teacher += tl.where(kept, mass * tl.log(total_t), 0.0)
                        if KD_STUDENT:
                            kd_student = tempered * scale_tempered[:, None] - probability
                        if CE_TEACHER:
                            ce_teacher = plain_t * (mass * scale_t)[:, None] - target
                        if KD_TEACHER:
                            # log p - log q less its mean under p, where what is common to the pixel's classes cancels
                            if SINGLE:
                                mean = tl.sum(_product(probability, ratio), axis=1)
                            else:
                                mean = tl.load(
                                    statistics + first_place + place + 6 * statistics_stride, mask=inside, other=0.0
                                )
                            kd_teacher = _product(probability, ratio - mean[:, None])
                    if HAS_UPSTREAM:
                        if CE_STUDENT:
                            ce_student *= tl.load(upstream[0] + first_place + place, mask=kept, other=0.0)[:, None]
                        if CE_TEACHER:
                            ce_teacher *= tl.load(upstream[1] + first_place + place, mask=kept, other=0.0)[:, None]
                        if KD_STUDENT or KD_TEACHER:
                            grad_kd = tl.load(upstream[2] + first_place + place, mask=inside, other=0.0) * temperature
                            ce_student += grad_kd[:, None] * kd_student
                            ce_teacher += grad_kd[:, None] * kd_teacher
                    right = tl.where(inside, across, 0.0)
                    left = tl.where(inside, 1.0 - across, 0.0)
                    below_right = right * vertical
                    below_left = left * vertical
                    weights = (left - below_left, right - below_right, below_left, below_right)
                    if A:
                        a = _spread(a, ce_student, weights)
                    if B:
                        b = _spread(b, kd_student, weights)
                    if C:
                        c = _spread(c, ce_teacher, weights)
                    if D:
                        d = _spread(d, kd_teacher, weights)
                if LOSSES:
                    log_student += tl.log(student_product)
                    log_teacher += tl.log(teacher_product)
                    log_quotient += tl.log(quotient)
        if LOSSES and row == first_row and row > 0:
            # The band above counts these cells.
            student_label = few
            teacher_label = few
            divergence = few
            log_student = zeros
            log_teacher = zeros
            log_quotient = zeros
            counted = zeros
        complete = stored & (row > first_row)
        first_gradient = sample * strides[0] + (row - 1) * row_stride
        if A:
            _store(gradients[0] + first_gradient, gradient_place, complete, a, 1.0, CELLS, BLOCK)
            a = (a[2], a[3], none, none)
        if B:
            _store(gradients[1] + first_gradient, gradient_place, complete, b, temperature, CELLS, BLOCK)
            b = (b[2], b[3], none, none)
        if C:
            _store(gradients[2] + first_gradient, gradient_place, complete, c, 1.0, CELLS, BLOCK)
            c = (c[2], c[3], none, none)
        if D:
            _store(gradients[3] + first_gradient, gradient_place, complete, d, temperature, CELLS, BLOCK)
            d = (d[2], d[3], none, none)
    if LOSSES:
        partials += tl.program_id(0)
        programs = tl.num_programs(0)
        # The strip to the right counts the last cell, unless there is none.
        owned = (lane < CELLS - 1) | (column == width)
        ce_student_loss = tl.where(owned, log_student - tl.sum(student_label, axis=1), 0.0)
        ce_teacher_loss = tl.where(owned, log_teacher - tl.sum(teacher_label, axis=1), 0.0)
        kd_loss = tl.where(owned, tl.sum(divergence, axis=1) - log_quotient, 0.0)
        tl.store(partials, tl.sum(ce_student_loss, axis=0))
        tl.store(partials + programs, tl.sum(ce_teacher_loss, axis=0))
        tl.store(partials + 2 * programs, temperature * temperature * tl.sum(kd_loss, axis=0))
        tl.store(partials + 3 * programs, tl.sum(tl.where(owned, counted, 0.0), axis=0))
