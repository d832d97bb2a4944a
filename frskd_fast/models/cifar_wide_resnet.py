"""The wide residual networks for CIFAR that RepDistiller, SSKD and HSAKD share, with the parameter names of their checkpoints.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016. FRSKD's, with one BatchNorm a group, is in `wide_resnet.py`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions, initialise_linears
from .auxiliary import AuxiliaryClassifier, remaining_stages
from .registry import register_model


class PreactivationBlock(nn.Module):
    """x -> s(x) + conv2(relu(bn2(conv1(a)))), a = relu(bn1(x)); s(x) is x, or convShortcut(a) where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, normalised: Tensor | None = None) -> Tensor:
        """`normalised` is bn1(x), where it is known already."""
        activated = F.relu(self.bn1(x), inplace=True) if normalised is None else F.relu(normalised)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class PreactivationGroup(nn.Module):
    """Blocks of one width, one behind the other; the first carries the stride."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreactivationBlock(in_channels, out_channels, stride),
            *(PreactivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor, normalised: Tensor | None = None) -> Tensor:
        """`normalised` is what the first block's `bn1` makes of x, where it is known already."""
        first, *others = self.layer
        x = first(x, normalised)
        for block in others:
            x = block(x)
        return x


class CIFARWideResNet(nn.Module):
    """features_l = group_l(features_{l-1}) for three groups; logits = fc(mean over pixels of relu(bn1(features_3))).

    Args:
        depth: number of layers, 6 * n + 4 for n blocks in a group.
        widen_factor: groups are 16, 32 and 64 times this many channels wide.
        num_classes: number of logits, K.

    Attributes:
        channels: channels of each feature map, finest first.
        num_classes: K.
        classifier_name: name of the linear layer, "fc".

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`: three
    maps (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H, and logits (N, K). The maps are sums of
    residuals, neither normalised nor rectified. With `preact=True` they are what the BatchNorm that reads them makes of
    them, before its ReLU.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on a depth that is not
            6 * n + 4; on a `num_classes` or `widen_factor` below 1.

    Differences from the original:
        * Features are the maps of the groups only. The original adds the first convolution's and the mean of the last map.
        * Averaging covers the whole last map, so any image size works; the original's 8 x 8 window needs 32 x 32 images.
        * `preact=True` changes no running statistics; the original runs two of the BatchNorms twice.

    Example:
        >>> import torch
        >>> features, logits = wrn_16_1(num_classes=10)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)], (2, 10))

    Source: SSKD's `models/wrn.py`, which is RepDistiller's.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 100) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        check_positive_integer("widen_factor", widen_factor)
        check_positive_integer("depth", depth)
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6 * n + 4 for n >= 1 blocks in a group (10, 16, 22, ...), but is {depth}.")
        self.num_classes = num_classes
        self.channels = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self._blocks = (depth - 4) // 6

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = self._group(0, 16, 1)
        self.block2 = self._group(1, self.channels[0], 2)
        self.block3 = self._group(2, self.channels[1], 2)
        self.bn1 = nn.BatchNorm2d(self.channels[2])
        self.classifier_name = "fc"
        self.fc = nn.Linear(self.channels[2], num_classes)
        initialise_convolutions(self)
        initialise_linears(self)

    def _group(self, level: int, in_channels: int, stride: int) -> PreactivationGroup:
        return PreactivationGroup(self._blocks, in_channels, self.channels[level], stride)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that makes each map of `preact=True`, finest first, for overhaul margins.

        Example:
            >>> [batch_norm.num_features for batch_norm in wrn_16_2().get_bn_before_relu()]
            [32, 64, 128]
        """
        second: Any = self.block2.layer[0]
        third: Any = self.block3.layer[0]
        return [second.bn1, third.bn1, self.bn1]

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the groups after l, the last one the last group at stride 1; BatchNorm and ReLU."""
        width = self.channels[-1]
        extractors = remaining_stages(self.channels, self._group)
        necks = [nn.BatchNorm2d(width) for _ in extractors]
        classifier = AuxiliaryClassifier(extractors, width, num_classes, necks=necks, neck_name="bn", final_relu=True)
        initialise_convolutions(classifier)
        initialise_linears(classifier)
        return classifier

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, self.conv1.in_channels)
        x = self.block1(self.conv1(images))
        features, before_relu = [x], []
        for group, batch_norm in zip((self.block2, self.block3), self.get_bn_before_relu()[:-1], strict=True):
            if preact:
                # Here instead of in the block, so that statistics are gathered once.
                before_relu.append(batch_norm(x))
                x = group(x, before_relu[-1])
            else:
                x = group(x)
            features.append(x)
        before_relu.append(self.bn1(x))
        logits = self.fc(F.relu(before_relu[-1]).mean(dim=(2, 3)))
        return (before_relu if preact else features), logits


@register_model
def wrn_16_1(num_classes: int = 100) -> CIFARWideResNet:
    """WRN-16-1 for 32 x 32 images.

    Example:
        >>> wrn_16_1(num_classes=10).channels
        [16, 32, 64]
    """
    return CIFARWideResNet(16, 1, num_classes)


@register_model
def wrn_16_2(num_classes: int = 100) -> CIFARWideResNet:
    """WRN-16-2 for 32 x 32 images.

    Example:
        >>> wrn_16_2(num_classes=10).channels
        [32, 64, 128]
    """
    return CIFARWideResNet(16, 2, num_classes)


@register_model
def wrn_40_1(num_classes: int = 100) -> CIFARWideResNet:
    """WRN-40-1 for 32 x 32 images.

    Example:
        >>> wrn_40_1(num_classes=10).channels
        [16, 32, 64]
    """
    return CIFARWideResNet(40, 1, num_classes)


@register_model
def wrn_40_2(num_classes: int = 100) -> CIFARWideResNet:
    """WRN-40-2 for 32 x 32 images.

    Example:
        >>> wrn_40_2(num_classes=10).channels
        [32, 64, 128]
    """
    return CIFARWideResNet(40, 2, num_classes)
