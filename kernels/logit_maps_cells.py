"""What the kernels of ``logit_maps`` share: cells, interpolation, labels.

A cell holds the pixels of the labels' size that lie between two neighbouring low-resolution pixels, and so have the same four
corners. Along an axis of w low-resolution and W fine pixels, cell c lies between the low-resolution pixels c - 1 and c; the
cells 0 and w are the borders, where the position is clamped. A fine pixel x is at (x + 1/2) w / W - 1/2.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exponentials(
    z,  # logits relative to a point near the row's maximum
    inverse_temperature,
    POWER: tl.constexpr,
):
    """exp(z / T) and exp(z), as powers of two: GPUs have these, and tl.exp would spend instructions on subnormal results."""
    tempered = tl.exp2(z * (inverse_temperature * LOG2_E))
    if POWER == 1:
        plain = tempered
    elif POWER == 2:
        plain = tempered * tempered
    elif POWER == 4:
        plain = tempered * tempered
        plain = plain * plain
    else:
        plain = tl.exp2(z * LOG2_E)
    return tempered, plain


@triton.jit
def cell_begin(cell, coarse, fine):
    """First fine pixel of a cell, in whole numbers; that of cell + 1 is its end."""
    numerator = tl.maximum((2 * cell - 1) * fine - coarse, 0)
    return tl.minimum((numerator + 2 * coarse - 1) // (2 * coarse), fine)


@triton.jit
def cell_slope(cell, begin, coarse, fine, ACCUMULATE: tl.constexpr):
    """The position of fine pixel ``begin`` in its cell, from 0 to 1, and how far it is to the next pixel."""
    inner = (cell > 0) & (cell < coarse)
    numerator = (2 * begin + 1) * coarse + fine - 2 * fine * cell
    # At the borders both corners are the same: all of the gradient goes to the one that exists.
    position = tl.where(inner, numerator.to(ACCUMULATE) / (2 * fine).to(ACCUMULATE), tl.where(cell == 0, 1.0, 0.0))
    return position, tl.where(inner, coarse.to(ACCUMULATE) / fine.to(ACCUMULATE), 0.0)


@triton.jit
def between(low, high, position):
    """Interpolates with weights, not with a difference, so that a class that is -inf in both neighbours stays so."""
    return (1.0 - position) * low + position * high


@triton.jit
def row_of_cells(
    top,  # pointer to the low-resolution row above
    bottom,  # to the one below
    place,  # (cells, classes) offsets of the left corners
    following,  # from a left to a right corner
    inside,  # (1, classes) whether there is such a class
    vertical,  # position of the pixels between the two rows
):
    """The logits of a fine row at the left end of each cell, and at its right end.

    Where there is no class they are so low that it has no probability, and finite, so that 0 times them is 0.
    """
    left = between(tl.load(top + place), tl.load(bottom + place), vertical)
    right = between(tl.load(top + place + following), tl.load(bottom + place + following), vertical)
    return tl.where(inside, left, -1e38), tl.where(inside, right, -1e38)


@triton.jit
def label_and_weight(
    targets,  # (N, H, W)
    class_weights,  # (K,), or unused
    place,  # of the pixels
    inside,  # whether there is such a pixel
    classes,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Label, whether it counts, and weight of each pixel: 0 where it is ignored, NaN where it is no class."""
    label = tl.load(targets + place, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    known = (label >= 0) & (label < classes)
    if HAS_WEIGHTS:
        weight = tl.load(class_weights + label, mask=kept & known, other=0.0)
    else:
        weight = tl.full(label.shape, 1.0, ACCUMULATE)
    return tl.where(kept, label, -1).to(tl.int32), kept, tl.where(kept, tl.where(known, weight, float("nan")), 0.0)


@triton.jit
def dense_sum(dense, classes, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr):
    """The part of a pixel's labels that is spread over all classes, s / K * sum_k w_k."""
    total = tl.zeros([BLOCK], ACCUMULATE)
    if SMOOTH:
        for first in range(0, classes, BLOCK):
            total += tl.load(dense + first + tl.arange(0, BLOCK))
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["count"])
def total_kernel(
    partials,  # (4, count) sums of the programs
    totals,  # (4,)
    count,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each of the four sums."""
    partials += tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([BLOCK], ACCUMULATE)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(partials + place, mask=place < count, other=0.0)
    tl.store(totals + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["classes", "width"])
def pack_kernel(
    maps,  # student, teacher: (N, K, h, w)
    packed,  # (N, h, w + 2, networks, stride): the columns at both ends are repeated, so that every cell has two
    strides,  # networks x (sample, row, pixel, class)
    classes,  # K
    pixels,  # h * w
    width,  # w
    stride,  # classes in ``packed``
    NETWORKS: tl.constexpr,
    FLAT: tl.constexpr,  # pixels are one axis in both maps
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each (block of pixels, block of classes, sample): the classes of a pixel become neighbours."""
    program = tl.program_id(0)
    tiles = tl.cdiv(pixels, PIXELS)
    pixel = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    program //= tiles
    column = (program % tl.cdiv(classes, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    sample = (program // tl.cdiv(classes, BLOCK)).to(tl.int64)
    mask = (pixel < pixels)[:, None] & (column < classes)[None, :]
    x = pixel % width
    size = NETWORKS * stride
    to = ((sample * (pixels // width) + pixel // width) * (width + 2) + x + 1)[:, None] * size + column[None, :]
    for network in tl.static_range(NETWORKS):
        step = strides[network]
        if FLAT:
            place = pixel.to(tl.int64) * step[2]
        else:
            place = (pixel // width).to(tl.int64) * step[1] + x.to(tl.int64) * step[2]
        place = sample * step[0] + place[:, None] + (column.to(tl.int64) * step[3])[None, :]
        z = tl.load(maps[network] + place, mask=mask, other=0.0).to(packed.dtype.element_ty)
        tl.store(packed + to, z, mask=mask)
        tl.store(packed + to - size, z, mask=mask & (x == 0)[:, None])
        tl.store(packed + to + size, z, mask=mask & (x == width - 1)[:, None])
        to += stride
