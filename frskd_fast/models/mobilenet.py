"""MobileNetV2 of half width for 32 x 32 images, as RepDistiller, SSKD and HSAKD use it.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions, initialise_linears
from .auxiliary import AuxiliaryClassifier, AuxiliaryNetwork, with_auxiliary_heads
from .registry import register_model

# Expansion, channels (already halved), blocks and stride of each group.
GROUPS = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
# The groups whose maps are handed out: the last of each size.
HANDED_OUT = (1, 2, 4, 6)
# Between the last but one map and the last.
LAST_GROUPS = GROUPS[HANDED_OUT[-2] + 1 :]
HEAD_CHANNELS = 1280


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """x -> relu(bn(conv(x)))."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    """x -> bn(conv1x1(depthwise3x3(conv1x1(x)))), with BatchNorm and ReLU between; plus x where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


def group(in_channels: int, out_channels: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
    """`blocks` inverted residuals, the first with the stride and the change of channels."""
    return nn.Sequential(
        InvertedResidual(in_channels, out_channels, stride, expansion),
        *(InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(blocks - 1)),
    )


class MobileNetV2(nn.Module):
    """features = the last maps of each size among seven groups of blocks; logits = classifier(mean of conv2(last map)).

    Args:
        num_classes: number of logits, K.
        stem_stride: stride of the first convolution: 2 in RepDistiller and SSKD, 1 in HSAKD. The parameters are the same.

    Attributes:
        channels: channels of each feature map, finest first.
        classifier_name: name of the last linear layer.
        other_names: names that layers have in other programs' checkpoints.

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`: four maps
    (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H / stem_stride, and logits (N, K). A block ends in its
    BatchNorm, so `preact=True` changes nothing.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on other strides than 1 and 2.

    Differences from the original:
        * Averaging covers the whole last map, so any image size works; the original's 2x2 window needs 32 x 32 images.
        * It prints nothing on construction, and the stem's map is not among the features.

    Example:
        >>> import torch
        >>> features, logits = MobileNetV2(num_classes=7)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 12, 16, 16), (2, 16, 8, 8), (2, 48, 4, 4), (2, 160, 2, 2)], (2, 7))

    Source: Sandler et al., CVPR 2018, at half width with ReLU for ReLU6, as in the releases of RepDistiller, SSKD and
    HSAKD.
    """

    classifier_name = "classifier"
    other_names: ClassVar = {"classifier.0": "classifier"}  # RepDistiller, mdistiller

    def __init__(self, num_classes: int = 100, stem_stride: int = 2) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is {stem_stride!r}, but 1 (HSAKD) or 2 (RepDistiller, SSKD) was wanted.")
        self.num_classes = num_classes
        self.channels = [GROUPS[position][1] for position in HANDED_OUT]
        in_channels = 16
        self.conv1 = convolution(3, in_channels, 3, stem_stride)
        self.blocks = nn.ModuleList()
        for expansion, channels, blocks, stride in GROUPS:
            self.blocks.append(group(in_channels, channels, blocks, stride, expansion))
            in_channels = channels
        self.conv2 = convolution(in_channels, HEAD_CHANNELS, 1)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        initialise_convolutions(self)
        initialise_linears(self, std=0.01)

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the groups after map l, the last two of them for the last map, and conv2."""
        extractors = []
        for position in HANDED_OUT:
            # None are left for the last map: those that made it, at stride 1.
            later = GROUPS[position + 1 :] or [(*shape, 1) for *shape, _ in LAST_GROUPS]
            in_channels = GROUPS[position][1]
            groups = []
            for expansion, channels, blocks, stride in later:
                groups.append(group(in_channels, channels, blocks, stride, expansion))
                in_channels = channels
            extractors.append(nn.Sequential(*groups))
        necks = [convolution(in_channels, HEAD_CHANNELS, 1) for _ in extractors]
        classifier = AuxiliaryClassifier(extractors, HEAD_CHANNELS, num_classes, necks=necks, neck_name="conv2_")
        initialise_convolutions(classifier)
        initialise_linears(classifier, std=0.01)
        return classifier

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, 3)
        x = self.conv1(images)
        features = []
        for position, blocks in enumerate(self.blocks):
            x = blocks(x)
            if position in HANDED_OUT:
                features.append(x)
        return features, self.classifier(self.conv2(x).mean(dim=(2, 3)))


@register_model(aliases=["MobileNetV2", "mobilenetV2"])
def mobilenetv2(num_classes: int = 100, stem_stride: int = 2) -> MobileNetV2:
    """MobileNetV2 of half width for 32 x 32 images. `stem_stride`: see `MobileNetV2`.

    Example:
        >>> mobilenetv2(num_classes=10).channels
        [12, 16, 48, 160]
    """
    return MobileNetV2(num_classes, stem_stride)


@register_model(aliases=["MobileNetV2_aux", "mobilenetV2_aux"])
def mobilenetv2_aux(num_classes: int = 100, stem_stride: int = 1) -> AuxiliaryNetwork:
    """`mobilenetv2` with HSAKD's auxiliary heads and, as there, a stem of stride 1.

    Example:
        >>> mobilenetv2_aux(num_classes=10).heads
        4
    """
    return with_auxiliary_heads(MobileNetV2(num_classes, stem_stride))
