"""A convolution with TensorFlow's "same" padding for one size of map."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def padded(x: Tensor, more: int) -> Tensor:
    """`x` with `more` rows and columns of zeros at the bottom and at the right."""
    return F.pad(x, (0, more, 0, more)) if more else x


class FixedPaddingConv2d(nn.Conv2d):
    """A convolution whose zero padding is TensorFlow's "same" for one size of map, and stays that for every other.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as for `torch.nn.Conv2d`; there is no bias.
        side: height and width of the map that the padding is made for.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, side: int, groups: int = 1
    ) -> None:
        total = max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0)
        before, after = total // 2, total - total // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, min(before, after), groups=groups, bias=False)
        # What is missing at the bottom and at the right.
        self.more = after - before

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(padded(x, self.more))
