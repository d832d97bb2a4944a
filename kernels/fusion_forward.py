"""Weighted fusion in Triton, forward: out = sum_i w^_i * pre(v_i) (the formula is in ``_fusion``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.fusion import Node, Settings, empty_output

from ._common import Geometry, geometries, geometry, launch
from ._fusion import (
    NUM_WARPS,
    Block,
    NodeLayout,
    Variant,
    activated,
    bits,
    block_of,
    hashable,
    kernel_node,
    laid_out,
    normalised_weights,
    places,
    resampled,
    tile_at,
    tile_elements,
    tiles_of,
)


@triton.jit(do_not_specialize=["tiles"])
def _forward_kernel(
    out,  # (N, C, H, W), the first tensor behind the inputs
    node,  # KernelNode
    tiles,  # of one sample
    epsilon: tl.float64,
    VARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each (sample, tile of channels, tile of pixels)."""
    count: tl.constexpr = VARIANT.count
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    number = program % tiles
    pixels = node.height * node.width
    pixel_tiles = tl.cdiv(pixels, BLOCK.pixels)
    tile = tile_at(
        sample, (number % pixel_tiles) * BLOCK.pixels, (number // pixel_tiles) * BLOCK.channels, pixels, node.width,
        node.channels, BLOCK, VARIANT.channels_fast, VARIANT.wide,
    )  # fmt: skip
    weights = normalised_weights(node.weight, epsilon, count, VARIANT.weighting, VARIANT.accumulate).normalised
    for index in tl.static_range(count):
        here = resampled(node, tile, index, VARIANT)
        term = weights[index] * activated(here.value, VARIANT.pre)
        if index == 0:
            fused = term
        else:
            fused += term
    place = places(out, node.strides, tile, count, VARIANT)
    tl.store(place, fused.to(out.dtype.element_ty), mask=tile.mask)


class _Plan(NamedTuple):
    """A launch."""

    layout: NodeLayout
    variant: Variant
    block: Block
    tiles: int  # of one sample


@functools.lru_cache(maxsize=256)
def _forward_plan(
    inputs: tuple[Geometry, ...], out: Geometry, dtype: torch.dtype, normalised: int, settings: Settings
) -> _Plan:
    layout, variant = laid_out(inputs, (out,), dtype, normalised, settings)
    pixels = layout.height * layout.width
    block = block_of(layout.channels, pixels, variant.channels_fast, tile_elements(1, dtype))
    return _Plan(layout, variant, block, tiles_of(layout.channels, pixels, block))


def forward(
    node: Node,
    settings: Settings,
    size: Sequence[int],  # (H, W) of the output
) -> Tensor:
    """The fused map (N, C, H, W) in the inputs' dtype; one launch."""
    out = empty_output(node.inputs[0], size)
    if out.numel() == 0:
        return out
    plan = _forward_plan(
        geometries(node.inputs), geometry(out), out.dtype, bits(node.statistics), hashable(settings)
    )  # fmt: skip
    launch(
        _forward_kernel, out.shape[0] * plan.tiles, out.device,
        out, kernel_node(node, plan.layout), plan.tiles, settings.epsilon,
        VARIANT=plan.variant, BLOCK=plan.block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
