"""Statistics of a batch in Triton: each channel's mean and variance over batch and pixels, of several images at once.

The first launch leaves the moments of chunks of tiles, the second merges them in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

from ._common import (
    Geometry,
    chunks,
    geometries,
    high_and_low,
    launch,
    layout_of,
    triton_accumulate_dtype,
)
from ._fusion import FINISH, NUM_WARPS, Block, FinishBlock, Size, Strides, block_of, masked, places, steps_of, tile_at

_TILE = 2048  # elements of a tile, the only tensor of which a program reads


class _Images(NamedTuple):
    """Images as the kernels take them."""

    channels: tuple[int, ...]  # images x C_i
    sizes: tuple[Size, ...]  # images
    steps: tuple[int, ...]  # images x tiles of pixels that one program adds up: a chunk
    chunk_counts: tuple[int, ...]  # images x programs for the same channels


class _Variant(NamedTuple):
    """What the kernels are compiled for. "Bit i" is that of image i."""

    count: int  # images
    blocks: tuple[Block, ...]  # of each image
    contiguity: int  # bit i: neighbouring channels lie closer together than pixels
    flat: int  # bit i: the pixels are one axis
    alignments: tuple[int, ...]  # of each image
    wide: bool  # some offset needs 64 bits
    accumulate: tl.dtype


@triton.jit
def _moments_chunk(
    image,  # (N, C, H, W)
    moments,  # (2, chunks, C): mean, and sum of squared deviations from it
    images,  # _Images
    strides,  # images x Strides
    chunk,
    first_channel,
    batch,
    INDEX: tl.constexpr,  # of the image
    VARIANT: tl.constexpr,
):
    """Moments of one chunk, from sums shifted by the mean of its first tile.

    That mean is at most sqrt(steps) deviations away from the chunk's, so the shifted squares lose next to nothing.
    """
    BLOCK: tl.constexpr = VARIANT.blocks[INDEX]
    channels_fast: tl.constexpr = (VARIANT.contiguity >> INDEX) & 1
    channels = images.channels[INDEX]
    steps = images.steps[INDEX]
    width = images.sizes[INDEX].width
    pixels = images.sizes[INDEX].height * width
    pixel_tiles = tl.cdiv(pixels, BLOCK.pixels)
    count = tl.zeros([], tl.int32)
    pivot = tl.full([1, BLOCK.channels], 0.0, VARIANT.accumulate)
    total = tl.full([BLOCK.pixels, BLOCK.channels], 0.0, VARIANT.accumulate)
    squares = total
    # Step 0 finds the pivot, and the steps after it begin with the same tile.
    for step in range(0, steps + 1):
        number = chunk * steps + tl.maximum(step - 1, 0)
        sample = (number // pixel_tiles).to(tl.int64)
        tile = tile_at(
            sample, (number % pixel_tiles) * BLOCK.pixels, first_channel, pixels, width, channels, BLOCK,
            channels_fast, VARIANT.wide,
        )  # fmt: skip
        exists = (tile.pixel < pixels) & (sample < batch)
        tile = masked(tile, exists[:, None])
        place = places(image, strides, tile, INDEX, VARIANT)
        value = tl.load(place, mask=tile.mask, other=0.0).to(VARIANT.accumulate)
        here = tl.sum(exists.to(tl.int32), axis=0)
        if step == 0:
            pivot = (tl.sum(value, axis=0) / here)[None, :].to(VARIANT.accumulate)
        else:
            difference = tl.where(tile.mask, value - pivot, 0.0)
            total += difference
            squares += difference * difference
            count += here
    shift = tl.sum(total, axis=0) / count
    mean = tl.sum(pivot, axis=0) + shift
    deviations = tl.sum(squares, axis=0) - shift * shift * count
    deviations = tl.where(deviations < 0.0, 0.0, deviations)
    channel = first_channel + tl.arange(0, BLOCK.channels)
    moments += tl.full([], chunk, tl.int64) * channels + channel
    tl.store(moments, mean, mask=channel < channels)
    plane = tl.full([], images.chunk_counts[INDEX], tl.int64) * channels
    tl.store(moments + plane, deviations, mask=channel < channels)


@triton.jit(do_not_specialize=["batch"])
def _moments_kernel(
    tensors,  # images x (N, C_i, H_i, W_i)
    moments,  # images x (2, chunks_i, C_i), one behind the other
    images,  # _Images
    strides,  # images x Strides
    batch,  # N
    VARIANT: tl.constexpr,
):
    """One program for each (image, tile of channels, chunk of tiles of pixels)."""
    count: tl.constexpr = VARIANT.count
    program = tl.program_id(0)
    for index in tl.static_range(count):
        chunk_count = images.chunk_counts[index]
        programs = chunk_count * tl.cdiv(images.channels[index], VARIANT.blocks[index].channels)
        if (program >= 0) & (program < programs):
            _moments_chunk(
                tensors[index], moments, images, strides, program % chunk_count,
                (program // chunk_count) * VARIANT.blocks[index].channels, batch, index, VARIANT,
            )  # fmt: skip
        program -= programs
        moments += tl.full([], 2, tl.int64) * chunk_count * images.channels[index]


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
    images,  # _Images
    first_channel,
    batch,
    INDEX: tl.constexpr,  # of the image
    VARIANT: tl.constexpr,
    FINISH_BLOCK: tl.constexpr,
):
    """Mean, 1 / sqrt(variance + epsilon) and variance of some channels, in float64, always in the same order."""
    block_pixels: tl.constexpr = VARIANT.blocks[INDEX].pixels
    rows: tl.constexpr = FINISH_BLOCK.rows
    channel = first_channel + tl.arange(0, FINISH_BLOCK.channels)
    channels = images.channels[INDEX]
    chunk_count = images.chunk_counts[INDEX]
    steps = images.steps[INDEX]
    pixels = images.sizes[INDEX].height * images.sizes[INDEX].width
    total = tl.full([rows, FINISH_BLOCK.channels], 0.0, tl.float64)
    for first in range(0, chunk_count, rows):
        row = first + tl.arange(0, rows)
        mask = (row < chunk_count)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        size = _chunk_sizes(row, chunk_count, steps, batch, pixels, block_pixels)
        total += size[:, None] * tl.load(moments + offset, mask=mask, other=0.0).to(tl.float64)
    number = tl.full([], batch, tl.float64) * pixels
    mean = tl.sum(total, axis=0) / number
    plane = tl.full([], chunk_count, tl.int64) * channels
    squares = tl.full([rows, FINISH_BLOCK.channels], 0.0, tl.float64)
    for first in range(0, chunk_count, rows):
        row = first + tl.arange(0, rows)
        mask = (row < chunk_count)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        size = _chunk_sizes(row, chunk_count, steps, batch, pixels, block_pixels)
        difference = tl.load(moments + offset, mask=mask, other=0.0).to(tl.float64) - mean[None, :]
        squares += tl.where(mask, size[:, None] * difference * difference, 0.0)
        squares += tl.load(moments + plane + offset, mask=mask, other=0.0).to(tl.float64)
    variance = tl.sum(squares, axis=0) / number
    mask = channel < channels
    tl.store(statistics + channel, mean.to(VARIANT.accumulate), mask=mask)
    tl.store(statistics + channels + channel, (1.0 / tl.sqrt(variance + epsilon)).to(VARIANT.accumulate), mask=mask)
    tl.store(statistics + 2 * channels + channel, variance.to(VARIANT.accumulate), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _statistics_kernel(
    moments,  # images x (2, chunks_i, C_i), one behind the other
    statistics,  # images x (3, C_i)
    epsilons,  # images x (high, low): their sum is added to the variance
    images,  # _Images
    batch,  # N
    VARIANT: tl.constexpr,
    FINISH_BLOCK: tl.constexpr,
):
    """One program for each (image, tile of channels)."""
    count: tl.constexpr = VARIANT.count
    program = tl.program_id(0)
    for index in tl.static_range(count):
        programs = tl.cdiv(images.channels[index], FINISH_BLOCK.channels)
        if (program >= 0) & (program < programs):
            high, low = epsilons[index]
            _merge_moments(
                moments, statistics[index], tl.full([], high, tl.float64) + low, images,
                program * FINISH_BLOCK.channels, batch, index, VARIANT, FINISH_BLOCK,
            )  # fmt: skip
        program -= programs
        moments += tl.full([], 2, tl.int64) * images.chunk_counts[index] * images.channels[index]


class _Plan(NamedTuple):
    """Two launches."""

    images: _Images
    strides: tuple[Strides, ...]  # images
    variant: _Variant
    programs: int  # of the first launch
    room: int  # elements of its workspace
    finish: FinishBlock
    finishing: int  # programs of the second launch


@functools.lru_cache(maxsize=256)
def _moments_plan(geometries_: tuple[Geometry, ...], dtype: torch.dtype) -> _Plan:
    layouts = [layout_of([image], [True], merge_samples=False) for image in geometries_]
    elements = _TILE if accumulate_dtype(dtype) == torch.float32 else _TILE // 2
    blocks, steps, chunk_counts = [], [], []
    programs = room = 0
    for (shape, _), layout in zip(geometries_, layouts, strict=True):
        batch, channels, height, width = shape
        block = block_of(channels, height * width, layout.channels_contiguous[0], elements)
        step, chunk_count = steps_of(batch, height * width, channels, block)
        blocks.append(block)
        steps.append(step)
        chunk_counts.append(chunk_count)
        programs += chunk_count * triton.cdiv(channels, block.channels)
        room += 2 * chunk_count * channels
    variant = _Variant(
        count=len(geometries_),
        blocks=tuple(blocks),
        contiguity=sum(layout.channels_contiguous[0] << place for place, layout in enumerate(layouts)),
        flat=sum(layout.flat << place for place, layout in enumerate(layouts)),
        alignments=tuple(layout.alignment for layout in layouts),
        wide=any(layout.wide for layout in layouts),
        accumulate=triton_accumulate_dtype(dtype),
    )
    images = _Images(
        tuple(shape[1] for shape, _ in geometries_),
        tuple(Size(*shape[2:]) for shape, _ in geometries_),
        tuple(steps),
        tuple(chunk_counts),
    )
    strides = tuple(Strides(*layout.strides[0]) for layout in layouts)
    finishing = sum(triton.cdiv(channels, FINISH.channels) for channels in images.channels)
    return _Plan(images, strides, variant, programs, room, FINISH, finishing)


def batch_statistics(
    inputs: Sequence[Tensor],  # K x (N, C, H_i, W_i)
    epsilons: Sequence[float],  # K, added to the variances
) -> list[Tensor]:
    """For each input (3, C): mean, 1 / sqrt(variance + epsilon), biased variance; two launches for 8 inputs."""
    first = inputs[0]
    dtype, device, batch = accumulate_dtype(first.dtype), first.device, first.shape[0]
    statistics = [torch.empty((3, image.shape[1]), dtype=dtype, device=device) for image in inputs]
    for part in chunks(len(inputs)):
        plan = _moments_plan(geometries(inputs[part]), first.dtype)
        moments = torch.empty(plan.room, dtype=dtype, device=device)
        launch(
            _moments_kernel, plan.programs, device,
            tuple(inputs[part]), moments, plan.images, plan.strides, batch,
            VARIANT=plan.variant, num_warps=NUM_WARPS,
        )  # fmt: skip
        steps: tuple[Any, ...] = tuple([high_and_low(epsilon) for epsilon in epsilons[part]])
        launch(
            _statistics_kernel, plan.finishing, device,
            moments, tuple(statistics[part]), steps, plan.images, batch,
            VARIANT=plan.variant, FINISH_BLOCK=plan.finish, num_warps=NUM_WARPS,
        )  # fmt: skip
    return statistics
