"""Weighted fusion in Triton, backward: the gradients of the inputs, gathered.

The gradient of an input is gathered over the output's pixels where it is not resampled, over its own pixels where it is
up-sampled, and over the cells of 2x2 pixels that begin a pooling window where it is pooled. A sample's tiles of all
inputs are neighbours in the launch, so that its gradient is read from memory once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.fusion import Node, Settings

from ._common import Geometry, geometries, geometry, launch
from ._fusion import (
    NONE,
    NUM_WARPS,
    POOL,
    SUM,
    UP,
    Block,
    NodeLayout,
    Variant,
    activated,
    affine_of,
    before_activation,
    bits,
    block_of,
    filled,
    hashable,
    kernel_node,
    laid_out,
    load_input,
    load_upstream,
    moved,
    nearest_source,
    normalised,
    normalised_weights,
    places,
    resampled,
    tile_at,
    tile_elements,
    tiles_of,
    total,
)
from .fusion_sums import finish

_NO_TAP = tl.constexpr(-100)  # of no window, nor of the padding


class Destinations(NamedTuple):
    """Outputs that read one pixel of an input."""

    most_rows: int
    most_columns: int
    rows: int  # where every pixel has as many, else 0
    columns: int


class _Pass(NamedTuple):
    """What the kernel is compiled for beside the node. "Bit i" is that of input i."""

    has_sums: int  # bit i; without them the statistics are constants
    needed: int  # bit i: the gradient is wanted
    need_weight: bool
    same_size: bool  # there are tiles of inputs of the output's size
    resampled: int  # bit i: there are tiles of this resampled input
    destinations: tuple[Destinations, ...]  # K
    blocks: tuple[Block, ...]  # K + 1: of each resampled input, and of the others


class _Tensors(NamedTuple):
    """What the kernel reads and writes beside the node."""

    grad: Any  # (N, C, H, W), the first tensor behind the inputs
    gradients: Any  # K x (N, C, H_i, W_i), the tensors behind it
    sums: Any  # K x (2, C): sum of dy and of dy * xhat
    counts: Any  # K x N * H_i * W_i
    partials: Any  # (K, programs): what each program adds to the D


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
    before = nearest_source(tl.maximum(destination - 1, 0), source_size, ratio)
    earlier = (destination > 0) & (before >= source)
    later = nearest_source(destination, source_size, ratio) < source
    destination = tl.where(earlier, destination - 1, tl.where(later, destination + 1, destination))
    return tl.where(source >= source_size, output_size, tl.minimum(destination, output_size))


@triton.jit
def _store_gradient(
    tensors,  # _Tensors
    node,  # KernelNode
    tile,  # Tile of the input
    gradient,  # (pixels, channels) d loss / d y
    raw,  # (pixels, channels) the input
    affine,  # Affine
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """Undo the normalisation and write d loss / d x."""
    if (VARIANT.normalised >> INDEX) & 1:
        gradient = gradient * affine.scale
    if (PASS.has_sums >> INDEX) & 1:
        # Products of channels first: fewer of them stay in registers.
        scale = affine.scale / (tl.full([], 1.0, VARIANT.accumulate) * tensors.counts[INDEX])
        mask = tile.channel < node.channels
        sums = tensors.sums[INDEX] + tile.channel
        mean = tl.load(sums, mask=mask, other=0.0)[None, :] * scale
        slope = tl.load(sums + node.channels, mask=mask, other=0.0)[None, :] * scale
        gradient = gradient - mean - (raw - affine.mean) * (affine.inverse * slope)
    tensor = tensors.gradients[INDEX]
    place = places(tensor, node.strides, tile, VARIANT.count + 1 + INDEX, VARIANT)
    tl.store(place, gradient.to(tensor.dtype.element_ty), mask=tile.mask)


@triton.jit
def _store_products(
    partials,  # (K, programs)
    program,
    programs,
    product,  # scalar: what this program adds to D_INDEX
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,  # K
):
    """Products of a program that sees one input only."""
    for index in tl.static_range(COUNT):
        if index == INDEX:
            tl.store(partials + index * programs + program, product)
        else:
            tl.store(partials + index * programs + program, product * 0.0)


@triton.jit
def _same_size_tile(
    tensors,  # _Tensors
    node,  # KernelNode
    weights,  # K x w^
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """Gradients of the inputs that have the output's size, and their D."""
    count: tl.constexpr = VARIANT.count
    BLOCK: tl.constexpr = PASS.blocks[count]
    tile = tile_at(
        sample, first_pixel, first_channel, node.height * node.width, node.width, node.channels, BLOCK,
        VARIANT.channels_fast, VARIANT.wide,
    )  # fmt: skip
    upstream = load_upstream(tensors.grad, node, tile, VARIANT)
    raws = ()
    for index in tl.static_range(count):
        raw = upstream
        if VARIANT.resamples[index] == NONE:
            if VARIANT.pre != 0 or PASS.need_weight or (PASS.has_sums >> index) & 1:
                raw = load_input(node, tile, index, VARIANT)
        raws += (raw,)
    for index in tl.static_range(count):
        product = tl.full([], 0.0, VARIANT.accumulate)
        if VARIANT.resamples[index] == NONE:
            affine = affine_of(node, tile.channel, index, VARIANT)
            value = normalised(raws[index], affine, index, VARIANT)
            if PASS.need_weight:
                product = total(tl.where(tile.mask, upstream * activated(value, VARIANT.pre), 0.0))
            if (PASS.needed >> index) & 1:
                gradient = before_activation(weights[index] * upstream, value, VARIANT.pre)
                _store_gradient(tensors, node, tile, gradient, raws[index], affine, index, VARIANT, PASS)
        if PASS.need_weight:
            tl.store(tensors.partials + index * programs + program, product)


@triton.jit
def _up_tile(
    tensors,  # _Tensors
    node,  # KernelNode
    weights,  # K x w^
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """Gradient of an up-sampled input, each pixel from the outputs that read it, and its D."""
    BLOCK: tl.constexpr = PASS.blocks[INDEX]
    DESTINATIONS: tl.constexpr = PASS.destinations[INDEX]
    most: tl.constexpr = DESTINATIONS.most_rows * DESTINATIONS.most_columns
    size = node.sizes[INDEX]
    ratio = node.ratios[INDEX]
    tile = tile_at(
        sample, first_pixel, first_channel, size.height * size.width, size.width, node.channels, BLOCK,
        VARIANT.channels_fast, VARIANT.wide,
    )  # fmt: skip
    if DESTINATIONS.rows > 0:
        top = tile.row * DESTINATIONS.rows
        bottom = top + DESTINATIONS.rows
    else:
        top = _first_destination(tile.row, size.height, node.height, ratio.rows)
        bottom = _first_destination(tile.row + 1, size.height, node.height, ratio.rows)
    if DESTINATIONS.columns > 0:
        left = tile.column * DESTINATIONS.columns
        right = left + DESTINATIONS.columns
    else:
        left = _first_destination(tile.column, size.width, node.width, ratio.columns)
        right = _first_destination(tile.column + 1, size.width, node.width, ratio.columns)
    gradient = tl.full([BLOCK.pixels, BLOCK.channels], 0.0, VARIANT.accumulate)
    if most <= 4:
        for step in tl.static_range(most):
            gradient += _upstream_of(tensors, node, tile, top, bottom, left, right, step, INDEX, VARIANT, PASS)
    else:
        for step in range(most):
            gradient += _upstream_of(tensors, node, tile, top, bottom, left, right, step, INDEX, VARIANT, PASS)
    raw = gradient
    if VARIANT.pre != 0 or PASS.need_weight or (PASS.has_sums >> INDEX) & 1:
        raw = load_input(node, tile, INDEX, VARIANT)
    affine = affine_of(node, tile.channel, INDEX, VARIANT)
    value = normalised(raw, affine, INDEX, VARIANT)
    if PASS.need_weight:
        product = total(tl.where(tile.mask, gradient * activated(value, VARIANT.pre), 0.0))
        _store_products(tensors.partials, program, programs, product, INDEX, VARIANT.count)
    if (PASS.needed >> INDEX) & 1:
        gradient = before_activation(weights[INDEX] * gradient, value, VARIANT.pre)
        _store_gradient(tensors, node, tile, gradient, raw, affine, INDEX, VARIANT, PASS)


@triton.jit
def _upstream_of(
    tensors,  # _Tensors
    node,  # KernelNode
    tile,  # Tile of an up-sampled input
    top,  # (pixels,) first row of the output that reads the pixel
    bottom,  # (pixels,) behind the last
    left,  # (pixels,) first column
    right,  # (pixels,) behind the last
    step,  # which of the outputs that read a pixel
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """d loss / d s at one of the outputs that read each pixel; 0 where there are fewer."""
    row = top + step // PASS.destinations[INDEX].most_columns
    column = left + step % PASS.destinations[INDEX].most_columns
    inside = (row < bottom) & (column < right)
    return load_upstream(tensors.grad, node, moved(tile, row, column, node.width, inside), VARIANT)


@triton.jit
def _tap(
    up,  # rows that the window begins above the cell
    left,  # columns that the window begins to the left of the cell
    Y: tl.constexpr,  # row of the pixel in the cell
    X: tl.constexpr,  # column of the pixel in the cell
):
    """Which of a window a pixel of a cell is: 3 * row + column, or ``_NO_TAP`` where it lies outside."""
    outside = up * Y + left * X > 0
    return tl.where(outside, _NO_TAP, 3 * (2 * up + Y) + 2 * left + X)


@triton.jit
def _pool_tile(
    tensors,  # _Tensors
    node,  # KernelNode
    weights,  # K x w^
    program,
    programs,
    sample,  # int64
    first_pixel,
    first_channel,
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """Gradient of a pooled input, and its D.

    The window of output (row, column) begins at a cell of 2x2 pixels, which no other window begins at; the cell's pixels
    lie in this window and in those one row up, one column to the left, and both.
    """
    BLOCK: tl.constexpr = PASS.blocks[INDEX]
    size = node.sizes[INDEX]
    cells = tile_at(
        sample, first_pixel, first_channel, node.height * node.width, node.width, node.channels, BLOCK,
        VARIANT.channels_fast, VARIANT.wide,
    )  # fmt: skip
    zeros = tl.full([BLOCK.pixels, BLOCK.channels], 0.0, VARIANT.accumulate)
    products = zeros
    gradient_00 = zeros
    gradient_01 = zeros
    gradient_10 = zeros
    gradient_11 = zeros
    for window in range(4):
        up = window // 2
        left = window % 2
        row = cells.row - up
        column = cells.column - left
        here = moved(cells, row, column, node.width, (row >= 0) & (column >= 0))
        upstream = load_upstream(tensors.grad, node, here, VARIANT)
        maximum = resampled(node, here, INDEX, VARIANT)
        if PASS.need_weight:
            # Each window counts in the cell that it begins at.
            products += tl.where(here.mask & (window == 0), upstream * activated(maximum.value, VARIANT.pre), 0.0)
        gradient = before_activation(weights[INDEX] * upstream, maximum.value, VARIANT.pre)
        gradient_00 += tl.where(maximum.tap == _tap(up, left, 0, 0), gradient, 0.0)
        gradient_01 += tl.where(maximum.tap == _tap(up, left, 0, 1), gradient, 0.0)
        gradient_10 += tl.where(maximum.tap == _tap(up, left, 1, 0), gradient, 0.0)
        gradient_11 += tl.where(maximum.tap == _tap(up, left, 1, 1), gradient, 0.0)
    if PASS.need_weight:
        _store_products(tensors.partials, program, programs, total(products), INDEX, VARIANT.count)
    if (PASS.needed >> INDEX) & 1:
        affine = affine_of(node, cells.channel, INDEX, VARIANT)
        gradients = (gradient_00, gradient_01, gradient_10, gradient_11)
        for step in tl.static_range(4):
            row = 2 * cells.row - size.height % 2 + step // 2
            column = 2 * cells.column - size.width % 2 + step % 2
            inside = (row >= 0) & (row < size.height) & (column >= 0) & (column < size.width)
            tile = moved(cells, row, column, size.width, inside)
            raw = gradients[step]
            if (PASS.has_sums >> INDEX) & 1:
                raw = load_input(node, tile, INDEX, VARIANT)
            _store_gradient(tensors, node, tile, gradients[step], raw, affine, INDEX, VARIANT, PASS)


@triton.jit(do_not_specialize=["tiles", "programs"])
def _gradient_kernel(
    tensors,  # _Tensors
    node,  # KernelNode
    tiles,  # of one sample, of all inputs
    programs,
    epsilon: tl.float64,
    VARIANT: tl.constexpr,
    PASS: tl.constexpr,
):
    """One program for each (sample, group of inputs, tile of channels, tile of pixels)."""
    count: tl.constexpr = VARIANT.count
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    tile = program % tiles
    weights = normalised_weights(node.weight, epsilon, count, VARIANT.weighting, VARIANT.accumulate).normalised
    if PASS.same_size:
        SHARED: tl.constexpr = PASS.blocks[count]
        pixel_tiles = tl.cdiv(node.height * node.width, SHARED.pixels)
        tiles_here = pixel_tiles * tl.cdiv(node.channels, SHARED.channels)
        if tile < tiles_here:
            _same_size_tile(
                tensors, node, weights, program, programs, sample, (tile % pixel_tiles) * SHARED.pixels,
                (tile // pixel_tiles) * SHARED.channels, VARIANT, PASS,
            )  # fmt: skip
        tile -= tiles_here
    for index in tl.static_range(count):
        if (PASS.resampled >> index) & 1:
            if VARIANT.resamples[index] == UP:
                pixel_tiles = tl.cdiv(node.sizes[index].height * node.sizes[index].width, PASS.blocks[index].pixels)
            else:
                pixel_tiles = tl.cdiv(node.height * node.width, PASS.blocks[index].pixels)
            tiles_here = pixel_tiles * tl.cdiv(node.channels, PASS.blocks[index].channels)
            if (tile >= 0) & (tile < tiles_here):
                first_pixel = (tile % pixel_tiles) * PASS.blocks[index].pixels
                first_channel = (tile // pixel_tiles) * PASS.blocks[index].channels
                if VARIANT.resamples[index] == UP:
                    _up_tile(
                        tensors, node, weights, program, programs, sample, first_pixel, first_channel, index, VARIANT,
                        PASS,
                    )  # fmt: skip
                else:
                    _pool_tile(
                        tensors, node, weights, program, programs, sample, first_pixel, first_channel, index, VARIANT,
                        PASS,
                    )  # fmt: skip
            tile -= tiles_here


def _destinations(source_size: int, output_size: int) -> tuple[int, int]:
    """Outputs that read one source along an axis: the most, and the number of each where all have as many, else 0."""
    ratio = np.float32(source_size) / np.float32(output_size)
    source = (np.arange(output_size, dtype=np.float32) * ratio).astype(np.int64)
    counts = np.bincount(np.minimum(source, source_size - 1), minlength=source_size)
    most = int(counts.max())
    return most, most if int(counts.min()) == most else 0


class _Plan(NamedTuple):
    """A launch."""

    layout: NodeLayout
    variant: Variant
    kernel_pass: _Pass
    counts: tuple[int, ...]  # K x N * H_i * W_i
    tiles: int  # of one sample, of all inputs
    programs: int


@functools.lru_cache(maxsize=256)
def _gradient_plan(
    inputs: tuple[Geometry, ...],
    grad: Geometry,
    gradients: tuple[Geometry, ...],
    dtype: torch.dtype,
    normalised_inputs: int,
    has_sums: int,
    settings: Settings,
    needed: tuple[bool, ...],
    need_weight: bool,
) -> _Plan:
    layout, variant = laid_out(inputs, (grad, *gradients), dtype, normalised_inputs, settings)
    elements = tile_elements(1, dtype)
    pixels = layout.height * layout.width
    batch = grad[0][0]

    def block(pixels: int, elements: int = elements) -> Block:
        return block_of(layout.channels, pixels, variant.channels_fast, elements)

    blocks, destinations = [], []
    tiles = resampled_inputs = 0
    same_size = False
    for place, (resample, size, need) in enumerate(zip(settings.resamples, layout.sizes, needed, strict=True)):
        rows, columns = (1, 1), (1, 1)
        walked = pixels
        if resample == UP.value:
            rows, columns = (_destinations(*pair) for pair in zip(size, (layout.height, layout.width), strict=True))
            walked = size.height * size.width
        blocks.append(block(walked, elements // 2 if resample == POOL.value else elements))
        destinations.append(Destinations(rows[0], columns[0], rows[1], columns[1]))
        if not (need or need_weight):
            continue
        if resample == NONE.value:
            same_size = True
        else:
            resampled_inputs |= 1 << place
            tiles += tiles_of(layout.channels, walked, blocks[-1])
    blocks.append(block(pixels))
    tiles += same_size * tiles_of(layout.channels, pixels, blocks[-1])
    kernel_pass = _Pass(
        has_sums=has_sums,
        needed=sum(need << place for place, need in enumerate(needed)),
        need_weight=need_weight,
        same_size=same_size,
        resampled=resampled_inputs,
        destinations=tuple(destinations),
        blocks=tuple(blocks),
    )
    counts = tuple(batch * size.height * size.width for size in layout.sizes)
    return _Plan(layout, variant, kernel_pass, counts, tiles, batch * tiles)


def backward(
    grad: Tensor,  # (N, C, H, W)
    node: Node,
    sums: Sequence[Tensor],  # K x (2, C), or empty: not normalised, or by running statistics
    settings: Settings,
    need_inputs: Sequence[bool],  # K
    need_weight: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the needed inputs, in their order, dtype and memory format; the weights' gradient (K,) or empty.

    One launch, and a small second one for the weights' gradient.
    """
    weight = node.weight
    # What is not needed is not written: the input stands in its place.
    gradients = [torch.empty_like(x) if needed else x for x, needed in zip(node.inputs, need_inputs, strict=True)]
    weighted = need_weight and settings.weighting != SUM.value
    plan = _gradient_plan(
        geometries(node.inputs), geometry(grad), geometries(gradients), grad.dtype, bits(node.statistics), bits(sums),
        hashable(settings), tuple(need_inputs), weighted,
    )  # fmt: skip
    partials = weight
    if weighted:
        partials = torch.empty((len(gradients), plan.programs), dtype=weight.dtype, device=weight.device)
    launch(
        _gradient_kernel, plan.programs, grad.device,
        _Tensors(grad, tuple(gradients), filled(sums, weight), plan.counts, partials), kernel_node(node, plan.layout),
        plan.tiles, plan.programs, settings.epsilon,
        VARIANT=plan.variant, PASS=plan.kernel_pass, num_warps=NUM_WARPS,
    )  # fmt: skip
    wanted = [gradient for gradient, needed in zip(gradients, need_inputs, strict=True) if needed]
    if not need_weight:
        return wanted, weight.new_empty(0)
    if not weighted:
        return wanted, torch.zeros_like(weight)
    no_sums = weight.new_empty((0, 2, 0, 0))
    return wanted, finish(partials, no_sums, [no_sums] * len(gradients), weight, settings)
