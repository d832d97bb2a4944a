"""The convolutional stages of EfficientNet-B0 to B2, in the form and with the keys of the package efficientnet-pytorch.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .fixed_padding import FixedPaddingConv2d
from .recomputed import convolved_gated_swish, convolved_swish


class Scale(NamedTuple):
    """How a network is scaled from B0: widths, depths, and the image side its paddings are made for."""

    width: float
    depth: float
    image_side: int


SCALES = (Scale(1.0, 1.0, 224), Scale(1.0, 1.1, 240), Scale(1.1, 1.2, 260))
STEM_WIDTH = 32
# Expansion, kernel, stride, channels and blocks of each stage of B0.
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))  # fmt: skip # noqa: E501
EPSILON, MOMENTUM = 1e-3, 0.01


def scaled_width(channels: int, factor: float) -> int:
    """`channels * factor` to the nearest multiple of 8, or the next one where that takes away more than a tenth.

    Example:
        >>> [scaled_width(channels, 1.1) for channels in (32, 16, 24, 40, 112)]
        [32, 16, 24, 48, 120]
    """
    wanted = channels * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class MBConvBlock(nn.Module):
    """project(squeeze_excite(swish(depthwise(swish(expand(x)))))), each convolution with its BatchNorm; plus x where it fits.

    Drop-connect is never active: FRSKD chains the blocks without it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int, side: int, first: bool
    ) -> None:
        super().__init__()
        inner, squeezed = in_channels * expansion, max(1, in_channels // 4)
        self.residual = stride == 1 and in_channels == out_channels and not first
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=EPSILON, momentum=MOMENTUM)
        self._depthwise_conv = FixedPaddingConv2d(inner, inner, kernel_size, stride, side, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=EPSILON, momentum=MOMENTUM)
        self._se_reduce = nn.Conv2d(inner, squeezed, 1)
        self._se_expand = nn.Conv2d(squeezed, inner, 1)
        self._project_conv = nn.Conv2d(inner, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=EPSILON, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        if self.expands:
            inner = convolved_swish(self._bn0, self._expand_conv(x), self._depthwise_conv)
        else:
            inner = self._depthwise_conv(x)
        gated = convolved_gated_swish(self._bn1, inner, self._se_reduce, self._se_expand, self._project_conv)
        out: Tensor = self._bn2(gated)
        return out + x if self.residual else out


class Stages(NamedTuple):
    """Stem and blocks of a network, in its order."""

    stem: nn.Sequential  # convolution of stride 2, BatchNorm
    blocks: list[MBConvBlock]
    channels: list[int]  # that each block hands on
    positions: list[tuple[int, int]]  # of each block: its stage, and its place there


def build_stages(variant: int) -> Stages:
    """The stem and the blocks of EfficientNet-B`variant`; the stem is without its activation.

    Example:
        >>> stages = build_stages(0)
        >>> len(stages.blocks), stages.channels[-1]
        (16, 320)
    """
    scale = SCALES[variant]
    width = scaled_width(STEM_WIDTH, scale.width)
    stem = nn.Sequential(
        FixedPaddingConv2d(3, width, 3, 2, scale.image_side), nn.BatchNorm2d(width, eps=EPSILON, momentum=MOMENTUM)
    )
    side = math.ceil(scale.image_side / 2)
    stages = Stages(stem, [], [], [])
    for stage, (expansion, kernel_size, stage_stride, base_width, base_depth) in enumerate(STAGES):
        out_width = scaled_width(base_width, scale.width)
        for position in range(math.ceil(base_depth * scale.depth)):
            stride = stage_stride if position == 0 else 1
            block = MBConvBlock(width, out_width, expansion, kernel_size, stride, side, first=position == 0)
            side, width = math.ceil(side / stride), out_width
            stages.blocks.append(block)
            stages.channels.append(width)
            stages.positions.append((stage, position))
    return stages


# What timm calls the layers of a block, without and with an expansion.
TIMM_LAYERS = (
    {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    {
        **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
        **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
    },
)
TIMM_SQUEEZE_EXCITE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}


def names_in_files(stages: Stages, stem: str, blocks: Sequence[str]) -> list[dict[str, str]]:
    """For each program whose files hold ImageNet's weights, a name in the file for each of ours.

    Args:
        stages: the layers.
        stem, blocks: our names of the stem and of each block.

    Returns:
        The names in files of efficientnet-pytorch and of timm (`efficientnet_b*` and `tf_efficientnet_b*`).

    Example:
        >>> stages = build_stages(0)
        >>> for names in names_in_files(stages, "stem", [str(position) for position in range(16)]):
        ...     print(names["stem.0.weight"], names["15._project_conv.weight"])
        _conv_stem.weight _blocks.15._project_conv.weight
        conv_stem.weight blocks.6.0.conv_pwl.weight
    """
    package, timm = {}, {}
    for key in stages.stem.state_dict():
        layer, _, tensor = key.partition(".")
        package[f"{stem}.{key}"] = f"{('_conv_stem', '_bn0')[int(layer)]}.{tensor}"
        timm[f"{stem}.{key}"] = f"{('conv_stem', 'bn1')[int(layer)]}.{tensor}"
    for index, (ours, block) in enumerate(zip(blocks, stages.blocks, strict=True)):
        stage, place = stages.positions[index]
        layers = TIMM_LAYERS[block.expands] | TIMM_SQUEEZE_EXCITE
        for key in block.state_dict():
            layer, _, tensor = key.partition(".")
            package[f"{ours}.{key}"] = f"_blocks.{index}.{key}"
            timm[f"{ours}.{key}"] = f"blocks.{stage}.{place}.{layers[layer]}.{tensor}"
    return [package, timm]
