"""ShuffleNet V1 and V2 for 32 x 32 images, as RepDistiller, SSKD and HSAKD use them.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018.
Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions, initialise_linears
from .auxiliary import AuxiliaryClassifier, remaining_stages
from .registry import register_model

STEM_CHANNELS = 24
GROUPS = 3
# Of V2's last convolution.
V2_WIDTH = 1024


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution of each channel by itself."""
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def pointwise(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


class ShuffleV1Block(nn.Module):
    """x -> relu(y + x), or relu(cat(y, pool(x))) of half size; y = bn3(conv3(relu(bn2(conv2(shuffle(relu(bn1(conv1(x)))))))).

    Args:
        in_channels, out_channels: of the block. With stride 2, y has their difference.
        stride: 2 for the form that halves the size.
        activated: False leaves the last ReLU to the caller.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, activated: bool = True) -> None:
        super().__init__()
        made = out_channels - in_channels if stride == 2 else out_channels
        inner = made // 4
        self.groups = 1 if in_channels == STEM_CHANNELS else GROUPS
        self.stride = stride
        self.activated = activated
        self.conv1 = pointwise(in_channels, inner, self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = depthwise(inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = pointwise(inner, made, GROUPS)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(torch.channel_shuffle(out, self.groups))), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            out = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            out = out + x
        return F.relu(out, inplace=True) if self.activated else out


class ShuffleV2DownBlock(nn.Module):
    """x -> shuffle(cat(left(x), right(x))), both of size divided by `stride` and half of the channels; x is not negative."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = depthwise(in_channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = pointwise(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = pointwise(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise(half, stride)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))), inplace=True)
        return torch.channel_shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleV2Block(nn.Module):
    """x -> shuffle(cat(first half of x, relu(bn3(conv3(bn2(depthwise(relu(bn1(conv1(second half of x)))))))))).

    With `activated=False` the outer ReLU is left to the caller; the half that is kept passed one before.
    """

    def __init__(self, channels: int, activated: bool = True) -> None:
        super().__init__()
        half = channels // 2
        self.activated = activated
        self.conv1 = pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(changed)), inplace=True)
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        if self.activated:
            out = F.relu(out, inplace=True)
        return torch.channel_shuffle(torch.cat([kept, out], dim=1), 2)


class _ShuffleNet(nn.Module):
    """Stem, three stages and the walk through them, which both versions share."""

    classifier_name = "linear"
    channels: list[int]
    num_classes: int
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def stem(self, num_classes: int) -> None:
        """The first layers."""
        check_positive_integer("num_classes", num_classes)
        self.num_classes = num_classes
        self.conv1 = pointwise(3, STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)

    def stages(self, images: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        """The maps to hand out, and the last one after its ReLU."""
        check_images(images, 3)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3):
            before_relu = stage(x)
            x = F.relu(before_relu)
            features.append(before_relu if preact else x)
        return features, x


class ShuffleNetV1(_ShuffleNet):
    """features_l = relu(stage_l(features_{l-1})) for three stages; logits = linear(mean over pixels of features_3).

    Args:
        num_classes: number of logits, K.

    Attributes:
        channels: channels of each feature map, finest first.
        classifier_name: name of the last linear layer.

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`: three
    maps (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H / 2, and logits (N, K). With `preact=True` the
    maps are taken before their last ReLU.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on `num_classes` below 1.

    Differences from the original:
        * Averaging covers the whole last map, so any image size works; the original's 4x4 window needs 32 x 32 images.
        * The stem's map is not among the features.

    Example:
        >>> import torch
        >>> features, logits = ShuffleNetV1(num_classes=7)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 240, 16, 16), (2, 480, 8, 8), (2, 960, 4, 4)], (2, 7))

    Source: Zhang et al., CVPR 2018, with three groups and a stem of one 1x1 convolution, as in the releases of
    RepDistiller, SSKD and HSAKD.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.channels = [240, 480, 960]
        self.stem(num_classes)
        self.layer1 = self._stage(0, STEM_CHANNELS, activated=False)
        self.layer2 = self._stage(1, self.channels[0], activated=False)
        self.layer3 = self._stage(2, self.channels[1], activated=False)
        self.linear = nn.Linear(self.channels[2], num_classes)

    def _stage(self, level: int, in_channels: int, stride: int = 2, activated: bool = True) -> nn.Sequential:
        channels, blocks = self.channels[level], (4, 8, 4)[level]
        return nn.Sequential(
            ShuffleV1Block(in_channels, channels, stride),
            *(ShuffleV1Block(channels, channels) for _ in range(blocks - 2)),
            ShuffleV1Block(channels, channels, activated=activated),
        )

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the stages after l, the last one the last stage at stride 1."""
        classifier = AuxiliaryClassifier(remaining_stages(self.channels, self._stage), self.channels[-1], num_classes)
        initialise_convolutions(classifier)
        initialise_linears(classifier)
        return classifier

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        features, last = self.stages(images, preact)
        return features, self.linear(last.mean(dim=(2, 3)))


class ShuffleNetV2(_ShuffleNet):
    """features_l = relu(stage_l(features_{l-1})) for three stages; logits = linear(mean of relu(bn2(conv2(features_3)))).

    Args, attributes, calling, errors: as `ShuffleNetV1`; the last convolution has 1024 channels.

    Differences from the original:
        * Those of `ShuffleNetV1`.
        * With `preact=True` the channels stand in the same order as without; the original does not shuffle them.

    Example:
        >>> import torch
        >>> features, logits = ShuffleNetV2(num_classes=7)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 116, 16, 16), (2, 232, 8, 8), (2, 464, 4, 4)], (2, 7))

    Source: Ma et al., ECCV 2018, of width 1 with a stem of one 1x1 convolution, as in the releases of RepDistiller, SSKD
    and HSAKD.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.channels = [116, 232, 464]
        self.stem(num_classes)
        self.layer1 = self._stage(0, STEM_CHANNELS, activated=False)
        self.layer2 = self._stage(1, self.channels[0], activated=False)
        self.layer3 = self._stage(2, self.channels[1], activated=False)
        self.conv2 = pointwise(self.channels[2], V2_WIDTH)
        self.bn2 = nn.BatchNorm2d(V2_WIDTH)
        self.linear = nn.Linear(V2_WIDTH, num_classes)

    def _stage(self, level: int, in_channels: int, stride: int = 2, activated: bool = True) -> nn.Sequential:
        channels, blocks = self.channels[level], (3, 7, 3)[level]
        return nn.Sequential(
            ShuffleV2DownBlock(in_channels, channels, stride),
            *(ShuffleV2Block(channels) for _ in range(blocks - 1)),
            ShuffleV2Block(channels, activated=activated),
        )

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the stages after l and conv2, the last one the last stage at stride 1."""

        def chain(*stages: nn.Module) -> nn.Module:
            last = (pointwise(self.channels[2], V2_WIDTH), nn.BatchNorm2d(V2_WIDTH), nn.ReLU(inplace=True))
            return nn.Sequential(*stages, *last)

        return AuxiliaryClassifier(remaining_stages(self.channels, self._stage, chain), V2_WIDTH, num_classes)

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        features, last = self.stages(images, preact)
        return features, self.linear(F.relu(self.bn2(self.conv2(last)), inplace=True).mean(dim=(2, 3)))


@register_model(aliases=["ShuffleV1"])
def shufflenetv1(num_classes: int = 100) -> ShuffleNetV1:
    """ShuffleNet V1 with three groups for 32 x 32 images.

    Example:
        >>> shufflenetv1(num_classes=10).channels
        [240, 480, 960]
    """
    return ShuffleNetV1(num_classes)


@register_model(aliases=["ShuffleV2"])
def shufflenetv2(num_classes: int = 100) -> ShuffleNetV2:
    """ShuffleNet V2 of width 1 for 32 x 32 images.

    Example:
        >>> shufflenetv2(num_classes=10).channels
        [116, 232, 464]
    """
    return ShuffleNetV2(num_classes)
