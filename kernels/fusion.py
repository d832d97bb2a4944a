"""Weighted fusion of feature maps (one node of a BiFPN) in Triton, with each input's BatchNorm folded in.

out = act(s), s = sum_i w^_i * pre(v_i), v_i = resample_i(y_i), y_i = (x_i - mean) * (inverse deviation * gamma) + beta
(Ji et al., CVPR 2021, arXiv 2103.08273; Tan et al., "EfficientDet", CVPR 2020).

Maps are taken as tiles of (pixels, channels) of one sample, long along the contiguous axis. Forward and the sums of
backward go over the output's pixels. The gradient of an input is gathered: over the output's pixels where it is not
resampled, over its own pixels where it is up-sampled, and over the cells of 2x2 pixels that begin a pooling window where
it is pooled. A sample's tiles of all inputs are neighbours in the launch, so that its gradient is read from memory once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import empty_output

from ._common import (
    Geometry,
    aligned,
    chunks,
    geometries,
    geometry,
    high_and_low,
    launch,
    layout_of,
    power_of_two,
    tile_offsets,
    triton_accumulate_dtype,
)

# Positions in RESAMPLES of the reference.
_NONE, _UP, _POOL = 0, 1, 2

# Elements of a tile of one tensor, of which 4 warps hold 8 to a lane, and of the statistics' only tensor.
_TILE = 1024
_STATISTICS_TILE = 2048
_NUM_WARPS = 4

# Sums over all pixels: tiles that one program adds up, and how many programs it takes before one adds up several.
_MOST_STEPS = 64
_ENOUGH_PROGRAMS = 1024
_FINISH_ROWS = 64
_FINISH_CHANNELS = 8
_FINISH_STEP = 1024


@triton.jit
def _total(values):
    """Sum of a tile."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """The activation of ``value``; a NaN stays a NaN."""
    if ACTIVATION == 1:
        result = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == 2:
        result = value / (1.0 + tl.exp(-value))
    else:
        result = value
    return result


@triton.jit
def _before_activation(
    gradient,  # d loss / d activation(value)
    value,
    ACTIVATION: tl.constexpr,
):
    """d loss / d value."""
    if ACTIVATION == 1:
        result = tl.where(value <= 0.0, 0.0, gradient)
    elif ACTIVATION == 2:
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        result = gradient * (sigmoid * (1.0 + value * (1.0 - sigmoid)))
    else:
        result = gradient
    return result


@triton.jit
def _normalised_weights(
    weight,  # (K,)
    epsilon: tl.float64,
    K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """w^ (K scalars), what w^ was divided by, and the largest w."""
    largest = tl.load(weight)
    for index in tl.static_range(1, K):
        value = tl.load(weight + index)
        largest = tl.where(value > largest, value, largest)
    one = tl.full([], 1.0, ACCUMULATE)
    total = one * 0.0
    for index in tl.static_range(K):
        value = tl.load(weight + index)
        if WEIGHTING == 0:
            part = one
        elif WEIGHTING == 2:
            part = tl.exp(value - largest)
        else:
            # Written so that a NaN weight stays NaN.
            part = tl.where(value < 0.0, 0.0, value)
            if WEIGHTING == 3:
                part = tl.where(largest <= 0.0, one, part)
        total += part
        if index == 0:
            parts = (part,)
        else:
            parts = parts + (part,)  # noqa: RUF005
    if WEIGHTING == 0:
        divisor = one
    elif WEIGHTING == 1:
        divisor = total + tl.full([], epsilon, ACCUMULATE)
    elif WEIGHTING == 2:
        divisor = total
    else:
        divisor = tl.where(largest <= 0.0, total, total + tl.full([], epsilon, ACCUMULATE))
    for index in tl.static_range(K):
        if index == 0:
            normalised = (parts[index] / divisor,)
        else:
            normalised = normalised + (parts[index] / divisor,)  # noqa: RUF005
    return normalised, divisor, largest


@triton.jit
def _parameters(
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, C
    channel,  # (channels of the tile,)
    INDEX: tl.constexpr,  # of the input
    NORMALISED: tl.constexpr,  # bit i: of input i
    ACCUMULATE: tl.constexpr,
):
    """Mean, inverse deviation, inverse deviation * gamma, and beta, each (1, channels of the tile)."""
    if (NORMALISED >> INDEX) & 1:
        mask = channel < node[7]
        mean = tl.load(node[1][INDEX] + channel, mask=mask, other=0.0)
        inverse = tl.load(node[1][INDEX] + node[7] + channel, mask=mask, other=0.0)
        scale = inverse * tl.load(node[2][INDEX] + channel, mask=mask, other=0.0)
        shift = tl.load(node[3][INDEX] + channel, mask=mask, other=0.0)
        parameters = (mean[None, :], inverse[None, :], scale[None, :], shift[None, :])
    else:
        zero = tl.zeros([1, 1], ACCUMULATE)
        parameters = (zero, zero, zero, zero)
    return parameters


@triton.jit
def _normalised(
    raw,  # (pixels, channels)
    parameters,  # of ``_parameters``
    INDEX: tl.constexpr,  # of the input
    NORMALISED: tl.constexpr,  # bit i: of input i
):
    """(x - mean) * scale + beta. Explicitly one rounding less, so that equal inputs tie in every copy of this code."""
    if (NORMALISED >> INDEX) & 1:
        raw = tl.fma(raw - parameters[0], parameters[2], parameters[3])
    return raw


@triton.jit
def _places(
    tensor,  # (N, C, height, width)
    strides,  # of all tensors x (sample, image row, pixel, channel)
    sample,  # int64
    pixel,  # (pixels,) row * width + column
    row,  # (pixels,)
    column,  # (pixels,)
    channel,  # (channels,)
    PLACE: tl.constexpr,  # of the tensor among the strides
    CONTIGUITY: tl.constexpr,  # bit i: neighbouring channels of tensor i lie closer together than pixels
    FLAT: tl.constexpr,  # bit i: the pixels of tensor i are one axis
    ALIGN: tl.constexpr,  # of each tensor
):
    """Pointers (pixels, channels) into one tensor."""
    step: tl.constexpr = ALIGN[PLACE] if (CONTIGUITY >> PLACE) & 1 else 1
    if (FLAT >> PLACE) & 1:
        offset = pixel * aligned(strides[PLACE][2], step)
    else:
        offset = row * aligned(strides[PLACE][1], step) + column * aligned(strides[PLACE][2], step)
    # The sample first: only its offset needs 64 bits.
    tensor += sample * aligned(strides[PLACE][0], ALIGN[PLACE])
    return tensor + tile_offsets(offset, channel, strides[PLACE], (CONTIGUITY >> PLACE) & 1, ALIGN[PLACE])


@triton.jit
def _nearest_source(
    destination,  # (pixels,) along one axis
    source_size,
    ratio,  # float32 source size / float32 output size
):
    """Where nearest-neighbour up-sampling reads; rounded as PyTorch rounds it."""
    source = (destination.to(tl.float32) * ratio).to(tl.int32)
    return tl.minimum(source.to(destination.dtype), source_size - 1)


@triton.jit
def _first_destination(
    source,  # (pixels,) along one axis, may be source_size
    source_size,
    output_size,
    ratio,  # float32 source size / float32 output size
):
    """The first output index that reads ``source`` or a later one. Rounding moves it by one from the exact value."""
    exact = (source.to(tl.int64) * output_size + source_size - 1) // source_size
    destination = exact.to(source.dtype)
    before = _nearest_source(tl.maximum(destination - 1, 0), source_size, ratio)
    earlier = (destination > 0) & (before >= source)
    later = _nearest_source(destination, source_size, ratio) < source
    destination = tl.where(earlier, destination - 1, tl.where(later, destination + 1, destination))
    return tl.where(source >= source_size, output_size, tl.minimum(destination, output_size))


@triton.jit
def _resampled(
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, C
    sample,  # int64
    pixel,  # (pixels,) of the output
    row,  # (pixels,) of the output
    column,  # (pixels,) of the output
    channel,  # (channels,)
    mask,  # (pixels, channels)
    INDEX: tl.constexpr,  # of the input
    RESAMPLE: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """v of one input, the x that it comes from, and which of its window: 3 * row + column, or -1 in the padding.

    Of equals the first wins; a NaN counts as larger than everything before it, as in max_pool2d.
    """
    image = node[0][INDEX]
    strides = node[4]
    height = node[5][INDEX][0]
    width = node[5][INDEX][1]
    parameters = _parameters(node, channel, INDEX, NORMALISED, ACCUMULATE)
    if RESAMPLE == 2:
        for tap in tl.static_range(9):
            source_row = 2 * row - height % 2 + tap // 3
            source_column = 2 * column - width % 2 + tap % 3
            inside = (source_row >= 0) & (source_row < height) & (source_column >= 0) & (source_column < width)
            inside = inside[:, None]
            place = _places(
                image, strides, sample, source_row * width + source_column, source_row, source_column, channel,
                INDEX, CONTIGUITY, FLAT, ALIGN,
            )  # fmt: skip
            raw = tl.load(place, mask=mask & inside, other=0.0).to(ACCUMULATE)
            # The padding comes after the normalisation.
            value = tl.where(inside, _normalised(raw, parameters, INDEX, NORMALISED), 0.0)
            here = tl.where(inside, tap, -1)
            if tap == 0:
                largest = value
                picked = raw
                position = here + tl.zeros(value.shape, tl.int32)
            else:
                larger = (value > largest) | (value != value)
                largest = tl.where(larger, value, largest)
                picked = tl.where(larger, raw, picked)
                position = tl.where(larger, here, position)
    else:
        if RESAMPLE == 1:
            row = _nearest_source(row, height, node[6][INDEX][0])
            column = _nearest_source(column, width, node[6][INDEX][1])
            pixel = row * width + column
        place = _places(image, strides, sample, pixel, row, column, channel, INDEX, CONTIGUITY, FLAT, ALIGN)
        picked = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
        largest = _normalised(picked, parameters, INDEX, NORMALISED)
        position = tl.zeros([1, 1], tl.int32)
    return largest, picked, position


@triton.jit
def _tile_axes(
    first_pixel,
    first_channel,
    pixels,  # of one sample
    width,  # pixels of one image row
    channels,  # C
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pixel, row and column (pixels,), whether the pixel exists, channel (channels,), whether the channel exists."""
    pixel = first_pixel + tl.arange(0, BLOCK_PIXELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    if CHANNELS_FAST:
        pixel_mask = pixel < pixels
        channel_mask = channel < aligned(channels, ALIGN)
    else:
        pixel_mask = pixel < aligned(pixels, ALIGN)
        channel_mask = channel < channels
    return pixel, pixel // width, pixel % width, pixel_mask, channel, channel_mask


@triton.jit
def _fused(
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, channels
    weights,  # K x w^
    sample,  # int64
    pixel,  # (pixels,) of the output
    row,  # (pixels,) of the output
    column,  # (pixels,) of the output
    channel,  # (channels,)
    mask,  # (pixels, channels)
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    PRE: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # bit i: of tensor i of the strides
    FLAT: tl.constexpr,  # bit i: of tensor i of the strides
    ALIGN: tl.constexpr,  # of each tensor of the strides
    ACCUMULATE: tl.constexpr,
):
    """s = sum_i w^_i * pre(v_i)."""
    for index in tl.static_range(K):
        value, _, _ = _resampled(
            node, sample, pixel, row, column, channel, mask,
            index, RESAMPLES[index], NORMALISED, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
        )  # fmt: skip
        term = weights[index] * _activated(value, PRE)
        if index == 0:
            total = term
        else:
            total += term
    return total


@triton.jit(do_not_specialize=["tiles"])
def _forward_kernel(
    out,  # (N, C, H, W)
    inputs,  # K x (N, C, H_i, W_i)
    statistics,  # K x (>= 2, C)
    gammas,  # K x (C,)
    betas,  # K x (C,)
    weight,  # (K,)
    strides,  # (K inputs, out) x (sample, image row, pixel, channel)
    sizes,  # K x (H_i, W_i)
    ratios,  # K x (of H, of W): input / output
    channels,  # C
    height,  # H
    width,  # W
    tiles,  # of one sample
    epsilon: tl.float64,
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    WEIGHTING: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,  # bit i: of tensor i of ``strides``
    ALIGN: tl.constexpr,  # of each tensor of ``strides``
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (sample, tile of channels, tile of pixels)."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    tile = program % tiles
    pixel_tiles = tl.cdiv(height * width, BLOCK_PIXELS)
    pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
        (tile % pixel_tiles) * BLOCK_PIXELS, (tile // pixel_tiles) * BLOCK_CHANNELS, height * width, width, channels,
        BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_FAST, TILE_ALIGN, WIDE,
    )  # fmt: skip
    mask = pixel_mask[:, None] & channel_mask[None, :]
    weights, _, _ = _normalised_weights(weight, epsilon, K, WEIGHTING, ACCUMULATE)
    node = (inputs, statistics, gammas, betas, strides, sizes, ratios, channels)
    total = _fused(
        node, weights, sample, pixel, row, column, channel, mask,
        K, RESAMPLES, NORMALISED, PRE, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
    )  # fmt: skip
    place = _places(out, strides, sample, pixel, row, column, channel, K, CONTIGUITY, FLAT, ALIGN)
    tl.store(place, _activated(total, ACT).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_gradient(
    grad,  # (N, C, H, W)
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, channels
    weights,  # K x w^
    sample,  # int64
    row,  # (pixels,) of the output
    column,  # (pixels,) of the output
    width,  # W
    channel,  # (channels,)
    mask,  # (pixels, channels)
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """d loss / d s at any pixels of the output; 0 outside the mask."""
    pixel = row * width + column
    place = _places(grad, node[4], sample, pixel, row, column, channel, K, CONTIGUITY, FLAT, ALIGN)
    upstream = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
    if ACT != 0:
        total = _fused(
            node, weights, sample, pixel, row, column, channel, mask,
            K, RESAMPLES, NORMALISED, PRE, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
        )  # fmt: skip
        upstream = tl.where(mask, _before_activation(upstream, total, ACT), 0.0)
    return upstream


@triton.jit
def _store_gradient(
    tensor,  # (N, C, H_i, W_i)
    gradient,  # (pixels, channels) d loss / d y
    raw,  # (pixels, channels) the input
    parameters,  # of ``_parameters``
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, C
    sums,  # K x (2, C): sum of dy and of dy * xhat
    counts,  # K x N * H_i * W_i
    sample,  # int64
    pixel,  # (pixels,) of the input
    row,  # (pixels,) of the input
    column,  # (pixels,) of the input
    channel,  # (channels,)
    mask,  # (pixels, channels)
    INDEX: tl.constexpr,  # of the input
    K: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_SUMS: tl.constexpr,  # bit i: of input i; without them the statistics are constants
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Undo the normalisation and write d loss / d x."""
    if (NORMALISED >> INDEX) & 1:
        gradient = gradient * parameters[2]
    if (HAS_SUMS >> INDEX) & 1:
        # Products of channels first: fewer of them stay in registers.
        scale = parameters[2] / (tl.full([], 1.0, ACCUMULATE) * counts[INDEX])
        mean = tl.load(sums[INDEX] + channel, mask=channel < node[7], other=0.0)[None, :] * scale
        slope = tl.load(sums[INDEX] + node[7] + channel, mask=channel < node[7], other=0.0)[None, :] * scale
        gradient = gradient - mean - (raw - parameters[0]) * (parameters[1] * slope)
    place = _places(tensor, node[4], sample, pixel, row, column, channel, K + 1 + INDEX, CONTIGUITY, FLAT, ALIGN)
    tl.store(place, gradient.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _store_products(
    partials,  # (K, programs)
    program,
    programs,
    product,  # scalar: what this program adds to D_INDEX
    INDEX: tl.constexpr,
    K: tl.constexpr,
):
    """Products of a program that sees one input only."""
    for index in tl.static_range(K):
        if index == INDEX:
            tl.store(partials + index * programs + program, product)
        else:
            tl.store(partials + index * programs + program, product * 0.0)


@triton.jit
def _same_size_tile(
    grad,  # (N, C, H, W)
    gradients,  # K x (N, C, H_i, W_i)
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, channels
    sums,  # K x (2, C)
    counts,  # K x N * H_i * W_i
    weights,  # K x w^
    partials,  # (K, programs)
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    height,  # H
    width,  # W
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NEEDED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Gradients of the inputs that have the output's size, and their D."""
    pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
        first_pixel, first_channel, height * width, width, node[7],
        BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_FAST, TILE_ALIGN, WIDE,
    )  # fmt: skip
    mask = pixel_mask[:, None] & channel_mask[None, :]
    place = _places(grad, node[4], sample, pixel, row, column, channel, K, CONTIGUITY, FLAT, ALIGN)
    upstream = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    for index in tl.static_range(K):
        raw = upstream
        if ACT != 0 or (RESAMPLES[index] == 0 and (PRE != 0 or NEED_WEIGHT or (HAS_SUMS >> index) & 1)):
            value, raw, _ = _resampled(
                node, sample, pixel, row, column, channel, mask,
                index, RESAMPLES[index], NORMALISED, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
            )  # fmt: skip
            if ACT != 0:
                total += weights[index] * _activated(value, PRE)
        if index == 0:
            raws = (raw,)
        else:
            raws = raws + (raw,)  # noqa: RUF005
    upstream = _before_activation(upstream, total, ACT)
    for index in tl.static_range(K):
        product = tl.full([], 0.0, ACCUMULATE)
        if RESAMPLES[index] == 0:
            parameters = _parameters(node, channel, index, NORMALISED, ACCUMULATE)
            value = _normalised(raws[index], parameters, index, NORMALISED)
            if NEED_WEIGHT:
                product = _total(tl.where(mask, upstream * _activated(value, PRE), 0.0))
            if (NEEDED >> index) & 1:
                gradient = _before_activation(weights[index] * upstream, value, PRE)
                _store_gradient(
                    gradients[index], gradient, raws[index], parameters, node, sums, counts, sample, pixel, row, column,
                    channel, mask, index, K, NORMALISED, HAS_SUMS, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
                )  # fmt: skip
        if NEED_WEIGHT:
            tl.store(partials + index * programs + program, product)


@triton.jit
def _up_tile(
    grad,  # (N, C, H, W)
    gradient_out,  # (N, C, H_i, W_i)
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, channels
    sums,  # K x (2, C)
    counts,  # K x N * H_i * W_i
    weights,  # K x w^
    partials,  # (K, programs)
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    height,  # H
    width,  # W
    INDEX: tl.constexpr,
    DESTINATIONS: tl.constexpr,  # K x (most rows, most columns, rows if equal everywhere or 0, columns so)
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NEEDED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Gradient of an up-sampled input, each pixel from the outputs that read it, and its D."""
    size = node[5][INDEX]
    ratio = node[6][INDEX]
    pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
        first_pixel, first_channel, size[0] * size[1], size[1], node[7],
        BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_FAST, TILE_ALIGN, WIDE,
    )  # fmt: skip
    mask = pixel_mask[:, None] & channel_mask[None, :]
    if DESTINATIONS[4 * INDEX + 2] > 0:
        top = row * DESTINATIONS[4 * INDEX + 2]
        bottom = top + DESTINATIONS[4 * INDEX + 2]
    else:
        top = _first_destination(row, size[0], height, ratio[0])
        bottom = _first_destination(row + 1, size[0], height, ratio[0])
    if DESTINATIONS[4 * INDEX + 3] > 0:
        left = column * DESTINATIONS[4 * INDEX + 3]
        right = left + DESTINATIONS[4 * INDEX + 3]
    else:
        left = _first_destination(column, size[1], width, ratio[1])
        right = _first_destination(column + 1, size[1], width, ratio[1])
    gradient = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    if ACT == 0 and DESTINATIONS[4 * INDEX] * DESTINATIONS[4 * INDEX + 1] <= 4:
        for step in tl.static_range(DESTINATIONS[4 * INDEX] * DESTINATIONS[4 * INDEX + 1]):
            here_row = top + step // DESTINATIONS[4 * INDEX + 1]
            here_column = left + step % DESTINATIONS[4 * INDEX + 1]
            inside = (here_row < bottom) & (here_column < right)
            gradient += _sum_gradient(
                grad, node, weights, sample, here_row, here_column, width, channel, mask & inside[:, None],
                K, RESAMPLES, NORMALISED, PRE, ACT, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
            )  # fmt: skip
    else:
        for step in range(DESTINATIONS[4 * INDEX] * DESTINATIONS[4 * INDEX + 1]):
            here_row = top + step // DESTINATIONS[4 * INDEX + 1]
            here_column = left + step % DESTINATIONS[4 * INDEX + 1]
            inside = (here_row < bottom) & (here_column < right)
            gradient += _sum_gradient(
                grad, node, weights, sample, here_row, here_column, width, channel, mask & inside[:, None],
                K, RESAMPLES, NORMALISED, PRE, ACT, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
            )  # fmt: skip
    raw = gradient
    if PRE != 0 or NEED_WEIGHT or (HAS_SUMS >> INDEX) & 1:
        place = _places(
            node[0][INDEX], node[4], sample, pixel, row, column, channel, INDEX, CONTIGUITY, FLAT, ALIGN
        )  # fmt: skip
        raw = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
    parameters = _parameters(node, channel, INDEX, NORMALISED, ACCUMULATE)
    value = _normalised(raw, parameters, INDEX, NORMALISED)
    if NEED_WEIGHT:
        product = _total(tl.where(mask, gradient * _activated(value, PRE), 0.0))
        _store_products(partials, program, programs, product, INDEX, K)
    if (NEEDED >> INDEX) & 1:
        gradient = _before_activation(weights[INDEX] * gradient, value, PRE)
        _store_gradient(
            gradient_out, gradient, raw, parameters, node, sums, counts, sample, pixel, row, column, channel, mask,
            INDEX, K, NORMALISED, HAS_SUMS, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
        )  # fmt: skip


@triton.jit
def _pool_tile(
    grad,  # (N, C, H, W)
    gradient_out,  # (N, C, H_i, W_i)
    node,  # inputs, statistics, gammas, betas, strides, sizes, ratios, channels
    sums,  # K x (2, C)
    counts,  # K x N * H_i * W_i
    weights,  # K x w^
    partials,  # (K, programs)
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    height,  # H
    width,  # W
    INDEX: tl.constexpr,
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NEEDED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Gradient of a pooled input, and its D.

    The window of output (row, column) begins at a cell of 2x2 pixels, which no other window begins at; the cell's pixels
    lie in this window and in those one row up, one column to the left, and both.
    """
    size = node[5][INDEX]
    _pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
        first_pixel, first_channel, height * width, width, node[7],
        BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_FAST, TILE_ALIGN, WIDE,
    )  # fmt: skip
    mask = pixel_mask[:, None] & channel_mask[None, :]
    zeros = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    products = zeros
    gradient_00 = zeros
    gradient_01 = zeros
    gradient_10 = zeros
    gradient_11 = zeros
    for window in range(4):
        up = window // 2
        left = window % 2
        here_row = row - up
        here_column = column - left
        here = mask & ((here_row >= 0) & (here_column >= 0))[:, None]
        upstream = _sum_gradient(
            grad, node, weights, sample, here_row, here_column, width, channel, here,
            K, RESAMPLES, NORMALISED, PRE, ACT, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
        )  # fmt: skip
        value, _raw, position = _resampled(
            node, sample, here_row, here_row, here_column, channel, here,
            INDEX, 2, NORMALISED, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
        )  # fmt: skip
        if NEED_WEIGHT:
            # Each window counts in the cell that it begins at.
            own = here & (position > 100 * window - 2)
            products += tl.where(own, upstream * _activated(value, PRE), 0.0)
        gradient = _before_activation(weights[INDEX] * upstream, value, PRE)
        # Where the cell's pixels lie in this window; no position is as low as -98.
        gradient_00 += tl.where(position == 6 * up + 2 * left, gradient, 0.0)
        gradient_01 += tl.where(position == 6 * up + 1 - 100 * left, gradient, 0.0)
        gradient_10 += tl.where(position == 3 + 2 * left - 100 * up, gradient, 0.0)
        gradient_11 += tl.where(position == 4 - 100 * window, gradient, 0.0)
    if NEED_WEIGHT:
        _store_products(partials, program, programs, _total(products), INDEX, K)
    if (NEEDED >> INDEX) & 1:
        parameters = _parameters(node, channel, INDEX, NORMALISED, ACCUMULATE)
        for step in tl.static_range(4):
            if step == 0:
                gradient = gradient_00
            elif step == 1:
                gradient = gradient_01
            elif step == 2:
                gradient = gradient_10
            else:
                gradient = gradient_11
            own_row = 2 * row - size[0] % 2 + step // 2
            own_column = 2 * column - size[1] % 2 + step % 2
            own_pixel = own_row * size[1] + own_column
            inside = (own_row >= 0) & (own_row < size[0]) & (own_column >= 0) & (own_column < size[1])
            inside = mask & inside[:, None]
            raw = gradient
            if (HAS_SUMS >> INDEX) & 1:
                place = _places(
                    node[0][INDEX], node[4], sample, own_pixel, own_row, own_column, channel,
                    INDEX, CONTIGUITY, FLAT, ALIGN,
                )  # fmt: skip
                raw = tl.load(place, mask=inside, other=0.0).to(ACCUMULATE)
            _store_gradient(
                gradient_out, gradient, raw, parameters, node, sums, counts, sample, own_pixel, own_row, own_column,
                channel, inside, INDEX, K, NORMALISED, HAS_SUMS, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "programs"])
def _gradient_kernel(
    grad,  # (N, C, H, W)
    gradients,  # K x (N, C, H_i, W_i)
    inputs,  # K x (N, C, H_i, W_i)
    statistics,  # K x (>= 2, C)
    gammas,  # K x (C,)
    betas,  # K x (C,)
    weight,  # (K,)
    sums,  # K x (2, C)
    partials,  # (K, programs): what each program adds to the D
    strides,  # (K inputs, grad, K gradients) x (sample, image row, pixel, channel)
    sizes,  # K x (H_i, W_i)
    ratios,  # K x (of H, of W): input / output
    counts,  # K x N * H_i * W_i
    channels,  # C
    height,  # H
    width,  # W
    tiles,  # of one sample, of all inputs
    programs,
    epsilon: tl.float64,
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    HAS_SUMS: tl.constexpr,  # bit i: of input i
    NEEDED: tl.constexpr,  # bit i: the gradient of input i is wanted
    NEED_WEIGHT: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    WEIGHTING: tl.constexpr,
    SAME_SIZE: tl.constexpr,  # there are tiles of inputs of the output's size
    RESAMPLED: tl.constexpr,  # bit i: there are tiles of the resampled input i
    DESTINATIONS: tl.constexpr,  # K x (most rows, most columns, rows if equal everywhere or 0, columns so)
    BLOCK_PIXELS: tl.constexpr,  # K + 1: of each resampled input, and of the others
    BLOCK_CHANNELS: tl.constexpr,  # K + 1
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,  # bit i: of tensor i of ``strides``
    ALIGN: tl.constexpr,  # of each tensor of ``strides``
    TILE_ALIGN: tl.constexpr,  # K + 1
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (sample, group of inputs, tile of channels, tile of pixels)."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    tile = program % tiles
    weights, _, _ = _normalised_weights(weight, epsilon, K, WEIGHTING, ACCUMULATE)
    node = (inputs, statistics, gammas, betas, strides, sizes, ratios, channels)
    if SAME_SIZE:
        pixel_tiles = tl.cdiv(height * width, BLOCK_PIXELS[K])
        tiles_here = pixel_tiles * tl.cdiv(channels, BLOCK_CHANNELS[K])
        if tile < tiles_here:
            _same_size_tile(
                grad, gradients, node, sums, counts, weights, partials, program, programs, sample,
                (tile % pixel_tiles) * BLOCK_PIXELS[K], (tile // pixel_tiles) * BLOCK_CHANNELS[K], height, width,
                K, RESAMPLES, NORMALISED, HAS_SUMS, NEEDED, NEED_WEIGHT, PRE, ACT,
                BLOCK_PIXELS[K], BLOCK_CHANNELS[K], CHANNELS_FAST, CONTIGUITY, FLAT, ALIGN, TILE_ALIGN[K], WIDE,
                ACCUMULATE,
            )  # fmt: skip
        tile -= tiles_here
    for index in tl.static_range(K):
        if (RESAMPLED >> index) & 1:
            if RESAMPLES[index] == 1:
                pixel_tiles = tl.cdiv(sizes[index][0] * sizes[index][1], BLOCK_PIXELS[index])
            else:
                pixel_tiles = tl.cdiv(height * width, BLOCK_PIXELS[index])
            tiles_here = pixel_tiles * tl.cdiv(channels, BLOCK_CHANNELS[index])
            if (tile >= 0) & (tile < tiles_here):
                first_pixel = (tile % pixel_tiles) * BLOCK_PIXELS[index]
                first_channel = (tile // pixel_tiles) * BLOCK_CHANNELS[index]
                if RESAMPLES[index] == 1:
                    _up_tile(
                        grad, gradients[index], node, sums, counts, weights, partials, program, programs,
                        sample, first_pixel, first_channel, height, width,
                        index, DESTINATIONS, K, RESAMPLES, NORMALISED, HAS_SUMS, NEEDED, NEED_WEIGHT, PRE, ACT,
                        BLOCK_PIXELS[index], BLOCK_CHANNELS[index], CHANNELS_FAST, CONTIGUITY, FLAT, ALIGN,
                        TILE_ALIGN[index], WIDE, ACCUMULATE,
                    )  # fmt: skip
                else:
                    _pool_tile(
                        grad, gradients[index], node, sums, counts, weights, partials, program, programs,
                        sample, first_pixel, first_channel, height, width,
                        index, K, RESAMPLES, NORMALISED, HAS_SUMS, NEEDED, NEED_WEIGHT, PRE, ACT,
                        BLOCK_PIXELS[index], BLOCK_CHANNELS[index], CHANNELS_FAST, CONTIGUITY, FLAT, ALIGN,
                        TILE_ALIGN[index], WIDE, ACCUMULATE,
                    )  # fmt: skip
            tile -= tiles_here


@triton.jit(do_not_specialize=["batch", "steps", "chunk_count"])
def _sums_kernel(
    grad,  # (N, C, H, W)
    inputs,  # K x (N, C, H_i, W_i)
    statistics,  # K x (>= 2, C)
    gammas,  # K x (C,)
    betas,  # K x (C,)
    weight,  # (K,)
    partial_sums,  # (normalised inputs, 2, chunks, C): sum of dy and of dy * xhat
    partials,  # (K, programs): what each program adds to the D
    strides,  # (K inputs, grad) x (sample, image row, pixel, channel)
    sizes,  # K x (H_i, W_i)
    ratios,  # K x (of H, of W): input / output
    channels,  # C
    height,  # H
    width,  # W
    batch,  # N
    steps,  # tiles of pixels that one program adds up
    chunk_count,  # programs for the same channels
    epsilon: tl.float64,
    K: tl.constexpr,
    RESAMPLES: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    SLOTS: tl.constexpr,  # K x place among the normalised inputs
    NEED_WEIGHT: tl.constexpr,
    PRE: tl.constexpr,
    ACT: tl.constexpr,
    WEIGHTING: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,  # bit i: of tensor i of ``strides``
    ALIGN: tl.constexpr,  # of each tensor of ``strides``
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (tile of channels, chunk of tiles of pixels). Resampling keeps sums: dy need not be gathered."""
    program = tl.program_id(0)
    chunk = program % chunk_count
    first_channel = (program // chunk_count) * BLOCK_CHANNELS
    pixel_tiles = tl.cdiv(height * width, BLOCK_PIXELS)
    weights, _, _ = _normalised_weights(weight, epsilon, K, WEIGHTING, ACCUMULATE)
    node = (inputs, statistics, gammas, betas, strides, sizes, ratios, channels)
    zeros = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    for index in tl.static_range(K):
        if index == 0:
            gradient_sums = (zeros,)
        else:
            gradient_sums = gradient_sums + (zeros,)  # noqa: RUF005
    product_sums = gradient_sums
    weight_sums = gradient_sums
    for step in range(0, steps):
        number = chunk * steps + step
        sample = (number // pixel_tiles).to(tl.int64)
        pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
            (number % pixel_tiles) * BLOCK_PIXELS, first_channel, height * width, width, channels,
            BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_FAST, TILE_ALIGN, WIDE,
        )  # fmt: skip
        mask = pixel_mask[:, None] & channel_mask[None, :] & (sample < batch)
        place = _places(grad, strides, sample, pixel, row, column, channel, K, CONTIGUITY, FLAT, ALIGN)
        upstream = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
        total = zeros
        for index in tl.static_range(K):
            value, raw, position = _resampled(
                node, sample, pixel, row, column, channel, mask,
                index, RESAMPLES[index], NORMALISED, CONTIGUITY, FLAT, ALIGN, ACCUMULATE,
            )  # fmt: skip
            total += weights[index] * _activated(value, PRE)
            # A maximum in the padding belongs to no pixel.
            real = position >= 0
            if index == 0:
                values = (value,)
                raws = (raw,)
                reals = (real,)
            else:
                values = values + (value,)  # noqa: RUF005
                raws = raws + (raw,)  # noqa: RUF005
                reals = reals + (real,)  # noqa: RUF005
        upstream = tl.where(mask, _before_activation(upstream, total, ACT), 0.0)
        for index in tl.static_range(K):
            gradient_sum = gradient_sums[index]
            product_sum = product_sums[index]
            weight_sum = weight_sums[index]
            if NEED_WEIGHT:
                weight_sum += tl.where(mask, upstream * _activated(values[index], PRE), 0.0)
            if (NORMALISED >> index) & 1:
                parameters = _parameters(node, channel, index, NORMALISED, ACCUMULATE)
                gradient = _before_activation(weights[index] * upstream, values[index], PRE)
                gradient = tl.where(reals[index], gradient, 0.0)
                gradient_sum += gradient
                product_sum += gradient * ((raws[index] - parameters[0]) * parameters[1])
            if index == 0:
                new_gradient_sums = (gradient_sum,)
                new_product_sums = (product_sum,)
                new_weight_sums = (weight_sum,)
            else:
                new_gradient_sums = new_gradient_sums + (gradient_sum,)  # noqa: RUF005
                new_product_sums = new_product_sums + (product_sum,)  # noqa: RUF005
                new_weight_sums = new_weight_sums + (weight_sum,)  # noqa: RUF005
        gradient_sums = new_gradient_sums
        product_sums = new_product_sums
        weight_sums = new_weight_sums
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    plane = tl.full([], chunk_count, tl.int64) * channels
    partial_sums += tl.full([], chunk, tl.int64) * channels
    for index in tl.static_range(K):
        if (NORMALISED >> index) & 1:
            place = partial_sums + 2 * SLOTS[index] * plane + channel
            tl.store(place, tl.sum(gradient_sums[index], axis=0), mask=channel < channels)
            tl.store(place + plane, tl.sum(product_sums[index], axis=0), mask=channel < channels)
        if NEED_WEIGHT:
            product = _total(weight_sums[index])
            tl.store(partials + index * tl.num_programs(0) + program, product)


@triton.jit
def _column_sums(
    values,  # (rows, C), at the first channel
    rows,
    channel,  # (channels,)
    channels,  # C
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over the rows, in float64."""
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        total += tl.load(values + offset, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["programs", "chunk_count"])
def _finish_kernel(
    partials,  # (K, programs): what each program added to the D
    partial_sums,  # (normalised inputs, 2, chunks, C): sum of dy and of dy * xhat
    sums,  # K x (2, C)
    weight,  # (K,)
    weight_gradient,  # (K,)
    programs,
    chunk_count,  # chunks
    channels,  # C
    epsilon: tl.float64,
    K: tl.constexpr,
    NORMALISED: tl.constexpr,  # bit i: of input i
    SLOTS: tl.constexpr,  # K x place among the normalised inputs
    NEED_WEIGHT: tl.constexpr,
    WEIGHTING: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for the weights' gradient, then one for each (normalised input, tile of channels)."""
    block = tl.program_id(0)
    if block == 0:
        weights, divisor, largest = _normalised_weights(weight, epsilon, K, WEIGHTING, ACCUMULATE)
        projection = tl.full([], 0.0, tl.float64)
        for index in tl.static_range(K):
            lanes = tl.zeros([STEP], tl.float64)
            if NEED_WEIGHT:
                for first in range(0, programs, STEP):
                    program = first + tl.arange(0, STEP)
                    place = partials + index * programs + program
                    lanes += tl.load(place, mask=program < programs, other=0.0).to(tl.float64)
            derivative = tl.sum(lanes, axis=0)
            projection += derivative * weights[index]
            if index == 0:
                derivatives = (derivative,)
            else:
                derivatives = derivatives + (derivative,)  # noqa: RUF005
        for index in tl.static_range(K):
            excess = (derivatives[index] - projection).to(ACCUMULATE)
            by_softmax = weights[index] * excess
            by_sum = tl.where(tl.load(weight + index) <= 0.0, 0.0, excess / divisor)
            if WEIGHTING == 0:
                gradient = tl.full([], 0.0, ACCUMULATE)
            elif WEIGHTING == 1:
                gradient = by_sum
            elif WEIGHTING == 2:
                gradient = by_softmax
            else:
                gradient = tl.where(largest <= 0.0, by_softmax, by_sum)
            tl.store(weight_gradient + index, gradient)
    block -= 1
    blocks = tl.cdiv(channels, CHANNELS)
    plane = tl.full([], chunk_count, tl.int64) * channels
    for index in tl.static_range(K):
        if (NORMALISED >> index) & 1:
            if (block >= 0) & (block < blocks):
                channel = block * CHANNELS + tl.arange(0, CHANNELS)
                for which in tl.static_range(2):
                    total = _column_sums(
                        partial_sums + (2 * SLOTS[index] + which) * plane,
                        chunk_count,
                        channel,
                        channels,
                        ROWS,
                        CHANNELS,
                    )
                    tl.store(sums[index] + which * channels + channel, total.to(ACCUMULATE), mask=channel < channels)
            block -= blocks


@triton.jit
def _moments_chunk(
    image,  # (N, C, H, W)
    moments,  # (2, chunks, C): mean, and sum of squared deviations from it
    strides,  # images x (sample, image row, pixel, channel)
    chunk,
    chunk_count,
    first_channel,
    steps,
    batch,
    channels,
    height,
    width,
    INDEX: tl.constexpr,  # of the image
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Moments of one chunk, from sums shifted by the mean of its first tile.

    That mean is at most sqrt(steps) deviations away from the chunk's, so the shifted squares lose next to nothing.
    """
    pixels = height * width
    pixel_tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    count = tl.zeros([], tl.int32)
    pivot = tl.zeros([1, BLOCK_CHANNELS], ACCUMULATE)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    squares = total
    # Step 0 finds the pivot, and the steps after it begin with the same tile.
    for step in range(0, steps + 1):
        number = chunk * steps + tl.maximum(step - 1, 0)
        sample = (number // pixel_tiles).to(tl.int64)
        pixel, row, column, pixel_mask, channel, channel_mask = _tile_axes(
            (number % pixel_tiles) * BLOCK_PIXELS, first_channel, pixels, width, channels,
            BLOCK_PIXELS, BLOCK_CHANNELS, (CONTIGUITY >> INDEX) & 1, TILE_ALIGN, WIDE,
        )  # fmt: skip
        pixel_mask = pixel_mask & (sample < batch)
        mask = pixel_mask[:, None] & channel_mask[None, :]
        place = _places(image, strides, sample, pixel, row, column, channel, INDEX, CONTIGUITY, FLAT, ALIGN)
        value = tl.load(place, mask=mask, other=0.0).to(ACCUMULATE)
        here = tl.sum(pixel_mask.to(tl.int32), axis=0)
        if step == 0:
            pivot = (tl.sum(value, axis=0) / here)[None, :].to(ACCUMULATE)
        else:
            difference = tl.where(mask, value - pivot, 0.0)
            total += difference
            squares += difference * difference
            count += here
    shift = tl.sum(total, axis=0) / count
    mean = tl.sum(pivot, axis=0) + shift
    deviations = tl.sum(squares, axis=0) - shift * shift * count
    deviations = tl.where(deviations < 0.0, 0.0, deviations)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    moments += tl.full([], chunk, tl.int64) * channels + channel
    tl.store(moments, mean, mask=channel < channels)
    tl.store(moments + tl.full([], chunk_count, tl.int64) * channels, deviations, mask=channel < channels)


@triton.jit(do_not_specialize=["batch"])
def _moments_kernel(
    images,  # images x (N, C_i, H_i, W_i)
    moments,  # images x (2, chunks_i, C_i), one behind the other
    strides,  # images x (sample, image row, pixel, channel)
    channels,  # images x C_i
    sizes,  # images x (H_i, W_i)
    steps,  # images x tiles of pixels that one program adds up
    chunk_counts,  # images x programs for the same channels
    batch,  # N
    IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # bit i: of image i
    FLAT: tl.constexpr,  # bit i: of image i
    ALIGN: tl.constexpr,  # of each image
    TILE_ALIGN: tl.constexpr,  # of each image
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (image, tile of channels, chunk of tiles of pixels)."""
    program = tl.program_id(0)
    for index in tl.static_range(IMAGES):
        programs = chunk_counts[index] * tl.cdiv(channels[index], BLOCK_CHANNELS[index])
        if (program >= 0) & (program < programs):
            _moments_chunk(
                images[index], moments, strides, program % chunk_counts[index], chunk_counts[index],
                (program // chunk_counts[index]) * BLOCK_CHANNELS[index], steps[index], batch, channels[index],
                sizes[index][0], sizes[index][1],
                index, BLOCK_PIXELS[index], BLOCK_CHANNELS[index], CONTIGUITY, FLAT, ALIGN, TILE_ALIGN[index], WIDE,
                ACCUMULATE,
            )  # fmt: skip
        program -= programs
        moments += tl.full([], 2, tl.int64) * chunk_counts[index] * channels[index]


@triton.jit
def _chunk_sizes(
    row,  # (rows,) number of the chunk
    rows,  # chunks
    steps,
    batch,
    pixels,
    BLOCK_PIXELS: tl.constexpr,
):
    """How many pixels each chunk holds, in float64; 0 behind the last."""
    pixel_tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    last = tl.full([], batch, tl.int64) * pixel_tiles
    begin = tl.minimum(row.to(tl.int64) * steps, last)
    end = tl.minimum((row.to(tl.int64) + 1) * steps, last)
    before = (begin // pixel_tiles) * pixels + (begin % pixel_tiles) * BLOCK_PIXELS
    after = (end // pixel_tiles) * pixels + (end % pixel_tiles) * BLOCK_PIXELS
    return tl.where(row < rows, (after - before).to(tl.float64), 0.0)


@triton.jit
def _merge_moments(
    moments,  # (2, chunks, C): mean, and sum of squared deviations from it
    statistics,  # (3, C)
    epsilon,  # float64
    channel,  # (channels,)
    channels,  # C
    chunk_count,  # chunks
    steps,
    batch,
    pixels,
    BLOCK_PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Mean, 1 / sqrt(variance + epsilon) and variance of some channels, in float64, always in the same order."""
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(0, chunk_count, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < chunk_count)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        size = _chunk_sizes(row, chunk_count, steps, batch, pixels, BLOCK_PIXELS)
        total += size[:, None] * tl.load(moments + offset, mask=mask, other=0.0).to(tl.float64)
    number = tl.full([], batch, tl.float64) * pixels
    mean = tl.sum(total, axis=0) / number
    plane = tl.full([], chunk_count, tl.int64) * channels
    squares = tl.zeros([ROWS, CHANNELS], tl.float64)
    for first in range(0, chunk_count, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < chunk_count)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        size = _chunk_sizes(row, chunk_count, steps, batch, pixels, BLOCK_PIXELS)
        difference = tl.load(moments + offset, mask=mask, other=0.0).to(tl.float64) - mean[None, :]
        squares += tl.where(mask, size[:, None] * difference * difference, 0.0)
        squares += tl.load(moments + plane + offset, mask=mask, other=0.0).to(tl.float64)
    variance = tl.sum(squares, axis=0) / number
    mask = channel < channels
    tl.store(statistics + channel, mean.to(ACCUMULATE), mask=mask)
    tl.store(statistics + channels + channel, (1.0 / tl.sqrt(variance + epsilon)).to(ACCUMULATE), mask=mask)
    tl.store(statistics + 2 * channels + channel, variance.to(ACCUMULATE), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _statistics_kernel(
    moments,  # images x (2, chunks_i, C_i), one behind the other
    statistics,  # images x (3, C_i)
    epsilons,  # images x (high, low): their sum is added to the variance
    channels,  # images x C_i
    sizes,  # images x (H_i, W_i)
    steps,  # images x tiles of pixels in a chunk
    chunk_counts,  # images x chunks
    batch,  # N
    IMAGES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (image, tile of channels)."""
    program = tl.program_id(0)
    for index in tl.static_range(IMAGES):
        programs = tl.cdiv(channels[index], CHANNELS)
        if (program >= 0) & (program < programs):
            _merge_moments(
                moments, statistics[index],
                tl.full([], epsilons[index][0], tl.float64) + epsilons[index][1],
                program * CHANNELS + tl.arange(0, CHANNELS), channels[index], chunk_counts[index], steps[index], batch,
                sizes[index][0] * sizes[index][1], BLOCK_PIXELS[index], ROWS, CHANNELS, ACCUMULATE,
            )  # fmt: skip
        program -= programs
        moments += tl.full([], 2, tl.int64) * chunk_counts[index] * channels[index]


def _tile(channels: int, pixels: int, channels_fast: bool, elements: int) -> tuple[int, int]:
    """(pixels, channels) of a tile: long along the contiguous axis, the other axis takes what is left."""
    if channels_fast:
        channel_block = power_of_two(channels, 1, 256)
        return power_of_two(pixels, 1, elements // channel_block), channel_block
    pixel_block = power_of_two(pixels, 1, 128)
    return pixel_block, power_of_two(channels, 1, elements // pixel_block)


def _tile_elements(tensors: int, dtype: torch.dtype) -> int:
    """Elements of a tile where a lane keeps those of so many tensors in registers."""
    elements = _TILE if tensors <= 2 else _TILE // 2
    return elements // 2 if dtype == torch.float64 else elements


def _tile_alignment(channels: int, pixels: int, channels_fast: bool) -> int:
    """A power of two that divides the extent of the tile's contiguous axis."""
    return math.gcd(16, channels if channels_fast else pixels)


def _steps(batch: int, pixels: int, channels: int, block: tuple[int, int]) -> tuple[int, int]:
    """Tiles of pixels that one program adds up, and programs for the same channels; by the shape alone."""
    tiles = batch * triton.cdiv(pixels, block[0])
    enough = triton.cdiv(_ENOUGH_PROGRAMS, triton.cdiv(channels, block[1]))
    steps = min(max(tiles // enough, 1), _MOST_STEPS)
    return steps, triton.cdiv(tiles, steps)


def _destinations(source_size: int, output_size: int) -> tuple[int, int]:
    """Outputs that read one source along an axis: the most, and the number of each where all have as many, else 0."""
    ratio = np.float32(source_size) / np.float32(output_size)
    source = (np.arange(output_size, dtype=np.float32) * ratio).astype(np.int64)
    counts = np.bincount(np.minimum(source, source_size - 1), minlength=source_size)
    most = int(counts.max())
    return most, most if int(counts.min()) == most else 0


class _Node(NamedTuple):
    """What all kernels of a node need, by its shapes and strides alone."""

    arguments: tuple[Any, ...]  # strides, sizes, ratios
    channels_fast: bool
    constants: dict[str, Any]


def _node(
    inputs: tuple[Geometry, ...], others: tuple[Geometry, ...], resamples: tuple[int, ...], size: tuple[int, int]
) -> _Node:
    """``others`` are tensors that a kernel reads or writes beside the inputs."""
    layouts = [layout_of([tensor], [True], merge_samples=False) for tensor in (*inputs, *others)]
    # The largest input decides about the order of the axes: the others cost less when they are read against it.
    areas = [shape[2] * shape[3] for shape, _ in inputs]
    channels_fast = layouts[areas.index(max(areas))].channels_contiguous[0]
    ratios = tuple(
        tuple(float(np.float32(source) / np.float32(output)) for source, output in zip(shape[2:], size, strict=True))
        for shape, _ in inputs
    )
    arguments = (tuple(layout.strides[0] for layout in layouts), tuple(tuple(shape[2:]) for shape, _ in inputs), ratios)
    constants = {
        "K": len(inputs),
        "RESAMPLES": resamples,
        "CHANNELS_FAST": channels_fast,
        "CONTIGUITY": sum(layout.channels_contiguous[0] << place for place, layout in enumerate(layouts)),
        "FLAT": sum(layout.flat << place for place, layout in enumerate(layouts)),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "WIDE": any(layout.wide for layout in layouts),
    }
    return _Node(arguments, channels_fast, constants)


@functools.lru_cache(maxsize=256)
def _forward_plan(
    inputs: tuple[Geometry, ...], out: Geometry, resamples: tuple[int, ...], size: tuple[int, int], elements: int
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs, arguments (strides, sizes, ratios, C, H, W, tiles of a sample) and constants of the forward launch."""
    node = _node(inputs, (out,), resamples, size)
    batch, channels = out[0][:2]
    pixels = size[0] * size[1]
    block = _tile(channels, pixels, node.channels_fast, elements)
    tiles = triton.cdiv(pixels, block[0]) * triton.cdiv(channels, block[1])
    constants = {
        **node.constants,
        "BLOCK_PIXELS": block[0],
        "BLOCK_CHANNELS": block[1],
        "TILE_ALIGN": _tile_alignment(channels, pixels, node.channels_fast),
    }
    return batch * tiles, (*node.arguments, channels, *size, tiles), constants


@functools.lru_cache(maxsize=256)
def _sums_plan(
    inputs: tuple[Geometry, ...], grad: Geometry, resamples: tuple[int, ...], elements: int
) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    """Programs, chunks, arguments (strides, sizes, ratios, C, H, W, N, steps, chunks) and constants of the sums."""
    batch, channels, *size = grad[0]
    node = _node(inputs, (grad,), resamples, (size[0], size[1]))
    pixels = size[0] * size[1]
    block = _tile(channels, pixels, node.channels_fast, elements)
    steps, chunk_count = _steps(batch, pixels, channels, block)
    constants = {
        **node.constants,
        "BLOCK_PIXELS": block[0],
        "BLOCK_CHANNELS": block[1],
        "TILE_ALIGN": _tile_alignment(channels, pixels, node.channels_fast),
    }
    programs = chunk_count * triton.cdiv(channels, block[1])
    return programs, chunk_count, (*node.arguments, channels, *size, batch, steps, chunk_count), constants


@functools.lru_cache(maxsize=256)
def _gradient_plan(
    inputs: tuple[Geometry, ...],
    grad: Geometry,
    gradients: tuple[Geometry, ...],
    resamples: tuple[int, ...],
    needed: tuple[bool, ...],
    need_weight: bool,
    elements: int,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs, arguments (strides, sizes, ratios, counts, C, H, W, tiles of a sample, programs) and constants."""
    batch, channels, *size = grad[0]
    node = _node(inputs, (grad, *gradients), resamples, (size[0], size[1]))
    wanted = [need or need_weight for need in needed]
    blocks, alignments, destinations = [], [], []
    tiles = 0
    # The last group is that of all inputs of the output's size.
    groups = [*zip(resamples, inputs, wanted, strict=True)]
    same_size = any(want for resample, _, want in groups if resample == _NONE)
    for resample, (shape, _), want in [*groups, (_NONE, grad, same_size)]:
        height, width = shape[2:] if resample == _UP else size
        block = _tile(channels, height * width, node.channels_fast, elements // 2 if resample == _POOL else elements)
        blocks.append(block)
        alignments.append(_tile_alignment(channels, height * width, node.channels_fast))
        rows, columns = (
            (_destinations(source, output) for source, output in zip(shape[2:], size, strict=True))
            if resample == _UP
            else ((1, 1), (1, 1))
        )
        destinations += [rows[0], columns[0], rows[1], columns[1]]
        is_group = resample != _NONE or len(blocks) == len(groups) + 1
        if is_group and want:
            tiles += triton.cdiv(height * width, block[0]) * triton.cdiv(channels, block[1])
    counts = tuple(shape[0] * shape[2] * shape[3] for shape, _ in inputs)
    constants = {
        **node.constants,
        "NEEDED": sum(need << place for place, need in enumerate(needed)),
        "NEED_WEIGHT": need_weight,
        "SAME_SIZE": same_size,
        "RESAMPLED": sum((want and resample != _NONE) << place for place, (resample, _, want) in enumerate(groups)),
        "DESTINATIONS": tuple(destinations),
        "BLOCK_PIXELS": tuple(block[0] for block in blocks),
        "BLOCK_CHANNELS": tuple(block[1] for block in blocks),
        "TILE_ALIGN": tuple(alignments),
    }
    return batch * tiles, (*node.arguments, counts, channels, *size, tiles, batch * tiles), constants


@functools.lru_cache(maxsize=256)
def _moments_plan(
    images: tuple[Geometry, ...], elements: int
) -> tuple[int, int, tuple[Any, ...], tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Of the statistics: programs of the first launch, elements of its workspace, its arguments (strides, channels, sizes,
    steps, chunks), programs and constants shared with the second launch, constants of the first alone."""
    layouts = [layout_of([image], [True], merge_samples=False) for image in images]
    blocks, plans, alignments = [], [], []
    programs = room = 0
    for (shape, _), layout in zip(images, layouts, strict=True):
        batch, channels, height, width = shape
        fast = layout.channels_contiguous[0]
        block = _tile(channels, height * width, fast, elements)
        plan = _steps(batch, height * width, channels, block)
        blocks.append(block)
        plans.append(plan)
        alignments.append(_tile_alignment(channels, height * width, fast))
        programs += plan[1] * triton.cdiv(channels, block[1])
        room += 2 * plan[1] * channels
    arguments = (
        tuple(layout.strides[0] for layout in layouts),
        tuple(shape[1] for shape, _ in images),
        tuple(tuple(shape[2:]) for shape, _ in images),
        tuple(plan[0] for plan in plans),
        tuple(plan[1] for plan in plans),
    )
    finishing = sum(triton.cdiv(shape[1], _FINISH_CHANNELS) for shape, _ in images)
    shared = {"IMAGES": len(images), "BLOCK_PIXELS": tuple(block[0] for block in blocks)}
    alone = {
        "BLOCK_CHANNELS": tuple(block[1] for block in blocks),
        "CONTIGUITY": sum(layout.channels_contiguous[0] << place for place, layout in enumerate(layouts)),
        "FLAT": sum(layout.flat << place for place, layout in enumerate(layouts)),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "TILE_ALIGN": tuple(alignments),
        "WIDE": any(layout.wide for layout in layouts),
    }
    return programs, room, arguments, (finishing,), shared, alone


def batch_statistics(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    epsilons: Sequence[float],  # K, added to the variances
) -> list[Tensor]:
    """For each input (3, C): mean, 1 / sqrt(variance + epsilon), biased variance; two launches for 8 inputs."""
    first = inputs[0]
    dtype, device = accumulate_dtype(first.dtype), first.device
    accumulate = triton_accumulate_dtype(first.dtype)
    elements = _STATISTICS_TILE if dtype == torch.float32 else _STATISTICS_TILE // 2
    statistics = [torch.empty((3, image.shape[1]), dtype=dtype, device=device) for image in inputs]
    for part in chunks(len(inputs)):
        programs, room, arguments, (finishing,), shared, alone = _moments_plan(geometries(inputs[part]), elements)
        moments = torch.empty(room, dtype=dtype, device=device)
        batch = first.shape[0]
        launch(
            _moments_kernel, programs, device, tuple(inputs[part]), moments, *arguments, batch,
            ACCUMULATE=accumulate, num_warps=_NUM_WARPS, **shared, **alone,
        )  # fmt: skip
        launch(
            _statistics_kernel, finishing, device,
            moments, tuple(statistics[part]), tuple([high_and_low(epsilon) for epsilon in epsilons[part]]),
            *arguments[1:], batch,
            ROWS=_FINISH_ROWS, CHANNELS=_FINISH_CHANNELS, ACCUMULATE=accumulate, num_warps=_NUM_WARPS, **shared,
        )  # fmt: skip
    return statistics


def _bits(tensors: Sequence[Tensor]) -> int:
    """Bit i: tensor i is not empty."""
    return sum((tensor.numel() > 0) << place for place, tensor in enumerate(tensors))


def _filled(tensors: Sequence[Tensor], stand_in: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` with ``stand_in`` for empty ones, which no kernel reads."""
    return tuple([tensor if tensor.numel() > 0 else stand_in for tensor in tensors])


def forward(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],  # K x (>= 2, C), or empty where the input is not normalised
    gammas: Sequence[Tensor],  # K x (C,), or empty
    betas: Sequence[Tensor],  # K x (C,), or empty
    weight: Tensor,  # (K,)
    resamples: Sequence[int],  # K positions in RESAMPLES
    pre: int,  # position in ACTIVATIONS
    act: int,  # position in ACTIVATIONS
    weighting: int,  # position in WEIGHTINGS
    epsilon: float,  # added to the sum of the weights
    size: Sequence[int],  # (H, W) of the output
) -> Tensor:
    """The fused map (N, C, H, W) in the inputs' dtype; one launch."""
    accumulate = triton_accumulate_dtype(inputs[0].dtype)
    out = empty_output(inputs[0], size)
    if out.numel() == 0:
        return out
    programs, arguments, constants = _forward_plan(
        geometries(inputs), geometry(out), tuple(resamples), (size[0], size[1]), _tile_elements(1, out.dtype)
    )
    launch(
        _forward_kernel, programs, out.device,
        out, tuple(inputs), _filled(statistics, weight), _filled(gammas, weight), _filled(betas, weight), weight,
        *arguments, epsilon,
        NORMALISED=_bits(statistics), PRE=pre, ACT=act, WEIGHTING=weighting, ACCUMULATE=accumulate,
        num_warps=_NUM_WARPS, **constants,
    )  # fmt: skip
    return out


def _finish(
    partials: Tensor,  # (K, programs)
    partial_sums: Tensor,  # (normalised inputs, 2, chunks, C)
    sums: Sequence[Tensor],  # K x (2, C), or empty
    weight: Tensor,  # (K,)
    weighting: int,
    epsilon: float,
) -> Tensor:
    """Add up what the programs of a launch left, into ``sums`` and the weights' gradient (K,)."""
    weight_gradient = torch.empty_like(weight)
    normalised = _bits(sums)
    channels = partial_sums.shape[3]
    launch(
        _finish_kernel, 1 + normalised.bit_count() * triton.cdiv(channels, _FINISH_CHANNELS), weight.device,
        partials, partial_sums, _filled(sums, weight), weight, weight_gradient, partials.shape[1],
        partial_sums.shape[2], channels, epsilon,
        K=weight.numel(), NORMALISED=normalised, SLOTS=_slots(normalised, weight.numel()),
        NEED_WEIGHT=weighting != 0, WEIGHTING=weighting, STEP=_FINISH_STEP, ROWS=_FINISH_ROWS,
        CHANNELS=_FINISH_CHANNELS, ACCUMULATE=triton_accumulate_dtype(weight.dtype), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return weight_gradient


def _slots(normalised: int, count: int) -> tuple[int, ...]:
    """For each input, how many of those before it are normalised."""
    return tuple((normalised & ((1 << place) - 1)).bit_count() for place in range(count))


def backward_sums(
    grad: Tensor,  # (N, C, H, W)
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],  # K x (>= 2, C), or empty where the input is not normalised
    gammas: Sequence[Tensor],  # K x (C,), or empty
    betas: Sequence[Tensor],  # K x (C,), or empty
    weight: Tensor,  # (K,)
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
) -> tuple[list[Tensor], Tensor]:
    """For each normalised input (2, C): sum of dy and of dy * xhat; and the weights' gradient (K,). Two launches."""
    accumulate = triton_accumulate_dtype(inputs[0].dtype)
    channels = grad.shape[1]
    dtype, device = weight.dtype, weight.device
    sums = [torch.empty((2, channels) if one.numel() > 0 else 0, dtype=dtype, device=device) for one in statistics]
    normalised = _bits(statistics)
    programs, chunk_count, arguments, constants = _sums_plan(
        geometries(inputs), geometry(grad), tuple(resamples), _tile_elements(len(inputs), grad.dtype)
    )
    partials = torch.empty((len(inputs), programs), dtype=dtype, device=device)
    partial_sums = torch.empty((normalised.bit_count(), 2, chunk_count, channels), dtype=dtype, device=device)
    launch(
        _sums_kernel, programs, grad.device,
        grad, tuple(inputs), _filled(statistics, weight), _filled(gammas, weight), _filled(betas, weight), weight,
        partial_sums, partials, *arguments, epsilon,
        NORMALISED=normalised, SLOTS=_slots(normalised, len(inputs)), NEED_WEIGHT=weighting != 0, PRE=pre, ACT=act,
        WEIGHTING=weighting, ACCUMULATE=accumulate, num_warps=_NUM_WARPS, **constants,
    )  # fmt: skip
    return sums, _finish(partials, partial_sums, sums, weight, weighting, epsilon)


def backward(
    grad: Tensor,  # (N, C, H, W)
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    statistics: Sequence[Tensor],  # K x (>= 2, C), or empty where the input is not normalised
    gammas: Sequence[Tensor],  # K x (C,), or empty
    betas: Sequence[Tensor],  # K x (C,), or empty
    weight: Tensor,  # (K,)
    sums: Sequence[Tensor],  # K x (2, C), or empty: not normalised, or by running statistics
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    need_inputs: Sequence[bool],  # K
    need_weight: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the needed inputs, in their order, dtype and memory format; the weights' gradient (K,) or empty.

    One launch, and a small second one for the weights' gradient.
    """
    accumulate = triton_accumulate_dtype(inputs[0].dtype)
    # What is not needed is not written: the input stands in its place.
    gradients = [torch.empty_like(x) if needed else x for x, needed in zip(inputs, need_inputs, strict=True)]
    weighted = need_weight and weighting != 0
    programs, arguments, constants = _gradient_plan(
        geometries(inputs),
        geometry(grad),
        geometries(gradients),
        tuple(resamples),
        tuple(need_inputs),
        weighted,
        _tile_elements(len(inputs) if act else 1, grad.dtype),
    )
    partials = weight
    if weighted:
        partials = torch.empty((len(inputs), programs), dtype=weight.dtype, device=weight.device)
    launch(
        _gradient_kernel, programs, grad.device,
        grad, tuple(gradients), tuple(inputs), _filled(statistics, weight), _filled(gammas, weight),
        _filled(betas, weight), weight, _filled(sums, weight), partials, *arguments, epsilon,
        NORMALISED=_bits(statistics), HAS_SUMS=_bits(sums), PRE=pre, ACT=act, WEIGHTING=weighting,
        ACCUMULATE=accumulate, num_warps=_NUM_WARPS, **constants,
    )  # fmt: skip
    wanted = [gradient for gradient, needed in zip(gradients, need_inputs, strict=True) if needed]
    if not need_weight:
        return wanted, weight.new_empty(0)
    if not weighted:
        return wanted, torch.zeros_like(weight)
    no_sums = weight.new_empty((0, 2, 0, 0))
    return wanted, _finish(partials, no_sums, [no_sums] * len(inputs), weight, weighting, epsilon)
