"""The VGG networks with BatchNorm for CIFAR that RepDistiller, SSKD and HSAKD share, with their checkpoints' parameter names.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions, initialise_linears
from .auxiliary import AuxiliaryClassifier
from .registry import register_model

WIDTHS = (64, 128, 256, 512, 512)
# Those of features; the fourth block's has the size of the fifth's.
FEATURE_BLOCKS = (0, 1, 2, 4)


def _block(in_channels: int, width: int, convolutions: int) -> nn.Sequential:
    """3x3 convolutions, each with BatchNorm, and a ReLU between two of them; the last ReLU is left to the reader."""
    layers: list[nn.Module] = []
    for channels, following in pairwise([in_channels] + [width] * convolutions):
        layers += [nn.Conv2d(channels, following, 3, padding=1), nn.BatchNorm2d(following), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(2, ceil_mode=True)


class VGG(nn.Module):
    """features_l = relu(block(pool(features_{l-1}))); logits = classifier(mean over pixels of features_L).

    Args:
        convolutions: number of convolutions in each of the five blocks, of 64, 128, 256, 512 and 512 channels.
        num_classes: number of logits, K.

    Attributes:
        channels: channels of each feature map, finest first.
        num_classes: K.
        classifier_name: name of the linear layer, "classifier".

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`: the maps
    of blocks 1, 2, 3 and 5, (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H, and logits (N, K). With
    `preact=True` the maps are taken before their ReLU. Images 64 pixels high pass one more pooling before block 5, as in
    the original, so that their last map has a quarter of the size of the one before.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on `num_classes` below 1.

    Differences from the original:
        * Features are the maps of the table in HSAKD's code. The original adds block 4's and the mean of the last map.
        * Pooling rounds odd sizes up, so any image size works and sizes halve as everywhere in this library.

    Example:
        >>> import torch
        >>> features, logits = vgg8(num_classes=10)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)], (2, 10))

    Source: SSKD's `models/vgg.py`, which is RepDistiller's.
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        self.num_classes = num_classes
        self.channels = [WIDTHS[block] for block in FEATURE_BLOCKS]
        self._convolutions = tuple(convolutions)
        self.block0 = self._block(0, 3)
        self.block1 = self._block(1, WIDTHS[0])
        self.block2 = self._block(2, WIDTHS[1])
        self.block3 = self._block(3, WIDTHS[2])
        self.block4 = self._block(4, WIDTHS[3])
        self.classifier_name = "classifier"
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        initialise_convolutions(self)
        initialise_linears(self, std=0.01)

    def _block(self, number: int, in_channels: int) -> nn.Sequential:
        return _block(in_channels, WIDTHS[number], self._convolutions[number])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that makes each pre-activation feature map, finest first, for overhaul margins.

        Example:
            >>> [batch_norm.num_features for batch_norm in vgg8().get_bn_before_relu()]
            [64, 128, 256, 512]
        """
        blocks: list[Any] = [self.block0, self.block1, self.block2, self.block3, self.block4]
        return [blocks[number][-1] for number in FEATURE_BLOCKS]

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats pools and blocks after l, the last one blocks 4 and 5; PyTorch's initialisation."""
        extractors = []
        for start in (1, 2, 3):
            layers: list[nn.Module] = []
            for number in range(start, 5):
                pool = [_pool()] if number < 4 else []
                layers += [*pool, self._block(number, WIDTHS[number - 1]), nn.ReLU(inplace=True)]
            extractors.append(nn.Sequential(*layers))
        last = [self._block(3, WIDTHS[4]), nn.ReLU(inplace=True), self._block(4, WIDTHS[3]), nn.ReLU(inplace=True)]
        return AuxiliaryClassifier([*extractors, nn.Sequential(*last)], WIDTHS[4], num_classes)

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, 3)
        pools_before = (False, True, True, True, images.shape[2] == 64)
        blocks = (self.block0, self.block1, self.block2, self.block3, self.block4)
        x = images
        maps = []
        for block, pools in zip(blocks, pools_before, strict=True):
            before_relu = block(F.max_pool2d(x, 2, ceil_mode=True) if pools else x)
            x = F.relu(before_relu)
            maps.append(before_relu if preact else x)
        return [maps[block] for block in FEATURE_BLOCKS], self.classifier(x.mean(dim=(2, 3)))


@register_model(aliases=["vgg8_bn"])
def vgg8(num_classes: int = 100) -> VGG:
    """VGG-8 with BatchNorm, for 32 x 32 images.

    Example:
        >>> vgg8(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return VGG((1, 1, 1, 1, 1), num_classes)


@register_model(aliases=["vgg11_bn"])
def vgg11(num_classes: int = 100) -> VGG:
    """VGG-11 with BatchNorm, for 32 x 32 images.

    Example:
        >>> vgg11(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return VGG((1, 1, 2, 2, 2), num_classes)


@register_model(aliases=["vgg13_bn"])
def vgg13(num_classes: int = 100) -> VGG:
    """VGG-13 with BatchNorm, for 32 x 32 images.

    Example:
        >>> vgg13(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return VGG((2, 2, 2, 2, 2), num_classes)


@register_model(aliases=["vgg16_bn"])
def vgg16(num_classes: int = 100) -> VGG:
    """VGG-16 with BatchNorm, for 32 x 32 images.

    Example:
        >>> vgg16(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return VGG((2, 2, 3, 3, 3), num_classes)


@register_model(aliases=["vgg19_bn"])
def vgg19(num_classes: int = 100) -> VGG:
    """VGG-19 with BatchNorm, for 32 x 32 images.

    Example:
        >>> vgg19(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return VGG((2, 2, 4, 4, 4), num_classes)
