"""Weighted fusion in Triton, backward, first pass: sums over all pixels, for the gradients of BatchNorms and weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.fusion import Node, Settings

from ._common import Geometry, geometries, geometry, launch, triton_accumulate_dtype
from ._fusion import (
    FINISH,
    NUM_WARPS,
    SOFTMAX,
    SUM,
    Block,
    FinishBlock,
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
    load_upstream,
    masked,
    normalised_weights,
    resampled,
    steps_of,
    tile_at,
    tile_elements,
    total,
)


@triton.jit(do_not_specialize=["batch", "steps", "chunk_count"])
def _sums_kernel(
    grad,  # (N, C, H, W), the first tensor behind the inputs
    node,  # KernelNode
    partial_sums,  # (normalised inputs, 2, chunks, C): sum of dy and of dy * xhat
    partials,  # (K, programs): what each program adds to the D
    batch,  # N
    steps,  # tiles of pixels that one program adds up
    chunk_count,  # programs for the same channels
    epsilon: tl.float64,
    VARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each (tile of channels, chunk of tiles of pixels). Resampling keeps sums: dy need not be gathered."""
    count: tl.constexpr = VARIANT.count
    need_weight: tl.constexpr = VARIANT.weighting != SUM
    program = tl.program_id(0)
    chunk = program % chunk_count
    first_channel = (program // chunk_count) * BLOCK.channels
    pixels = node.height * node.width
    pixel_tiles = tl.cdiv(pixels, BLOCK.pixels)
    weights = normalised_weights(node.weight, epsilon, count, VARIANT.weighting, VARIANT.accumulate).normalised
    zeros = tl.full([BLOCK.pixels, BLOCK.channels], 0.0, VARIANT.accumulate)
    gradient_sums = ()
    for _index in tl.static_range(count):
        gradient_sums += (zeros,)
    product_sums = gradient_sums
    weight_sums = gradient_sums
    for step in range(0, steps):
        number = chunk * steps + step
        sample = (number // pixel_tiles).to(tl.int64)
        tile = tile_at(
            sample, (number % pixel_tiles) * BLOCK.pixels, first_channel, pixels, node.width, node.channels, BLOCK,
            VARIANT.channels_fast, VARIANT.wide,
        )  # fmt: skip
        tile = masked(tile, sample < batch)
        upstream = load_upstream(grad, node, tile, VARIANT)
        values = ()
        raws = ()
        belongs = ()  # whether the maximum is a pixel's: one in the padding belongs to none
        for index in tl.static_range(count):
            here = resampled(node, tile, index, VARIANT)
            values += (here.value,)
            raws += (here.raw,)
            belongs += (here.tap >= 0,)
        # It is 0 there already, but told so once more, compilers keep fewer values alive (gfx942: 79 registers, not 94).
        upstream = tl.where(tile.mask, upstream, 0.0)
        new_gradient_sums = ()
        new_product_sums = ()
        new_weight_sums = ()
        for index in tl.static_range(count):
            weight_sum = weight_sums[index]
            gradient_sum = gradient_sums[index]
            product_sum = product_sums[index]
            if need_weight:
                weight_sum += tl.where(tile.mask, upstream * activated(values[index], VARIANT.pre), 0.0)
            if (VARIANT.normalised >> index) & 1:
                affine = affine_of(node, tile.channel, index, VARIANT)
                gradient = before_activation(weights[index] * upstream, values[index], VARIANT.pre)
                gradient = tl.where(belongs[index], gradient, 0.0)
                gradient_sum += gradient
                product_sum += gradient * ((raws[index] - affine.mean) * affine.inverse)
            new_gradient_sums += (gradient_sum,)
            new_product_sums += (product_sum,)
            new_weight_sums += (weight_sum,)
        gradient_sums = new_gradient_sums
        product_sums = new_product_sums
        weight_sums = new_weight_sums
    channel = first_channel + tl.arange(0, BLOCK.channels)
    plane = tl.full([], chunk_count, tl.int64) * node.channels
    partial_sums += tl.full([], chunk, tl.int64) * node.channels
    for index in tl.static_range(count):
        if (VARIANT.normalised >> index) & 1:
            place = partial_sums + channel
            tl.store(place, tl.sum(gradient_sums[index], axis=0), mask=channel < node.channels)
            tl.store(place + plane, tl.sum(product_sums[index], axis=0), mask=channel < node.channels)
            partial_sums += 2 * plane
        if need_weight:
            tl.store(partials + index * tl.num_programs(0) + program, total(weight_sums[index]))


class _Finish(NamedTuple):
    """What the second launch is compiled for."""

    count: int  # K
    normalised: int  # bit i: of input i
    weighting: int
    accumulate: tl.dtype
    block: FinishBlock


@triton.jit
def _column_sums(
    values,  # (rows, C)
    rows,
    channel,  # (channels,)
    channels,  # C
    BLOCK: tl.constexpr,
):
    """Sums over the rows, in float64."""
    sums = tl.full([BLOCK.rows, BLOCK.channels], 0.0, tl.float64)
    for first in range(0, rows, BLOCK.rows):
        row = first + tl.arange(0, BLOCK.rows)
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        offset = row.to(tl.int64)[:, None] * channels + channel[None, :]
        sums += tl.load(values + offset, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def _weight_gradient(
    partials,  # (K, programs)
    weight,  # (K,)
    weight_gradient,  # (K,)
    programs,
    epsilon: tl.float64,
    VARIANT: tl.constexpr,
):
    """d loss / d w from what each program added to D_i = d loss / d w^_i."""
    count: tl.constexpr = VARIANT.count
    step: tl.constexpr = VARIANT.block.step
    weights = normalised_weights(weight, epsilon, count, VARIANT.weighting, VARIANT.accumulate)
    projection = tl.full([], 0.0, tl.float64)
    derivatives = ()
    for index in tl.static_range(count):
        lanes = tl.full([step], 0.0, tl.float64)
        if VARIANT.weighting != SUM:
            for first in range(0, programs, step):
                program = first + tl.arange(0, step)
                place = partials + index * programs + program
                lanes += tl.load(place, mask=program < programs, other=0.0).to(tl.float64)
        derivative = tl.sum(lanes, axis=0)
        projection += derivative * weights.normalised[index]
        derivatives += (derivative,)
    for index in tl.static_range(count):
        excess = (derivatives[index] - projection).to(VARIANT.accumulate)
        if VARIANT.weighting == SUM:
            gradient = tl.full([], 0.0, VARIANT.accumulate)
        elif VARIANT.weighting == SOFTMAX:
            gradient = weights.normalised[index] * excess
        else:
            gradient = tl.where(tl.load(weight + index) <= 0.0, 0.0, excess / weights.divisor)
        tl.store(weight_gradient + index, gradient)


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
    VARIANT: tl.constexpr,
):
    """One program for the weights' gradient, then one for each (normalised input, tile of channels)."""
    count: tl.constexpr = VARIANT.count
    BLOCK: tl.constexpr = VARIANT.block
    block = tl.program_id(0)
    if block == 0:
        _weight_gradient(partials, weight, weight_gradient, programs, epsilon, VARIANT)
    block -= 1
    blocks = tl.cdiv(channels, BLOCK.channels)
    plane = tl.full([], chunk_count, tl.int64) * channels
    for index in tl.static_range(count):
        if (VARIANT.normalised >> index) & 1:
            if (block >= 0) & (block < blocks):
                channel = block * BLOCK.channels + tl.arange(0, BLOCK.channels)
                for which in tl.static_range(2):
                    found = _column_sums(partial_sums + which * plane, chunk_count, channel, channels, BLOCK)
                    place = sums[index] + which * channels + channel
                    tl.store(place, found.to(VARIANT.accumulate), mask=channel < channels)
            block -= blocks
            partial_sums += 2 * plane


def finish(
    partials: Tensor,  # (K, programs)
    partial_sums: Tensor,  # (normalised inputs, 2, chunks, C)
    sums: list[Tensor],  # K x (2, C), or empty
    weight: Tensor,  # (K,)
    settings: Settings,
) -> Tensor:
    """Add up what the programs of a launch left, into ``sums`` and the weights' gradient (K,); one launch."""
    weight_gradient = torch.empty_like(weight)
    normalised = bits(sums)
    chunk_count, channels = partial_sums.shape[2:]
    accumulate = triton_accumulate_dtype(weight.dtype)
    launch(
        _finish_kernel, 1 + normalised.bit_count() * triton.cdiv(channels, FINISH.channels), weight.device,
        partials, partial_sums, filled(sums, weight), weight, weight_gradient, partials.shape[1], chunk_count,
        channels, settings.epsilon,
        VARIANT=_Finish(weight.numel(), normalised, settings.weighting, accumulate, FINISH), num_warps=NUM_WARPS,
    )  # fmt: skip
    return weight_gradient


class _Plan(NamedTuple):
    """The first launch."""

    layout: NodeLayout
    variant: Variant
    block: Block
    programs: int
    steps: int
    chunk_count: int


@functools.lru_cache(maxsize=256)
def _sums_plan(
    inputs: tuple[Geometry, ...], grad: Geometry, dtype: torch.dtype, normalised: int, settings: Settings
) -> _Plan:
    layout, variant = laid_out(inputs, (grad,), dtype, normalised, settings)
    pixels = layout.height * layout.width
    block = block_of(layout.channels, pixels, variant.channels_fast, tile_elements(len(inputs), dtype))
    steps, chunk_count = steps_of(grad[0][0], pixels, layout.channels, block)
    programs = chunk_count * triton.cdiv(layout.channels, block.channels)
    return _Plan(layout, variant, block, programs, steps, chunk_count)


def backward_sums(
    grad: Tensor,  # (N, C, H, W)
    node: Node,
    settings: Settings,
) -> tuple[list[Tensor], Tensor]:
    """For each normalised input (2, C): sum of dy and of dy * xhat; and the weights' gradient (K,). Two launches."""
    batch, channels = grad.shape[:2]
    dtype, device = node.weight.dtype, node.weight.device
    sums = [torch.empty((2, channels) if one.numel() > 0 else 0, dtype=dtype, device=device) for one in node.statistics]
    normalised = bits(node.statistics)
    plan = _sums_plan(geometries(node.inputs), geometry(grad), grad.dtype, normalised, hashable(settings))
    partials = torch.empty((len(node.inputs), plan.programs), dtype=dtype, device=device)
    partial_sums = torch.empty((normalised.bit_count(), 2, plan.chunk_count, channels), dtype=dtype, device=device)
    launch(
        _sums_kernel, plan.programs, device,
        grad, kernel_node(node, plan.layout), partial_sums, partials, batch, plan.steps, plan.chunk_count,
        settings.epsilon, VARIANT=plan.variant, BLOCK=plan.block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums, finish(partials, partial_sums, sums, node.weight, settings)
