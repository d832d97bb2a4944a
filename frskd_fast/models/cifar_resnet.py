"""The residual networks for CIFAR that RepDistiller, SSKD and HSAKD share, with the parameter names of their checkpoints.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, and ResNet-50 with a stem for small images.
The networks of FRSKD are in `resnet.py`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions, initialise_linears
from .auxiliary import AuxiliaryClassifier, remaining_stages
from .registry import register_model
from .residual_blocks import BasicBlock, Bottleneck, ReLUSequential


class CIFARResNet(nn.Module):
    """features_l = relu(stage_l(features_{l-1})); logits = W mean over pixels of features_L + b.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: number of blocks in each stage.
        planes: width of each stage's 3x3 convolutions.
        stem_channels: channels of the first convolution, 3x3 of stride 1.
        num_classes: number of logits, K.

    Attributes:
        channels: channels of each feature map, finest first.
        num_classes: K.
        classifier_name: name of the linear layer, "fc", or "linear" with bottlenecks.

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`: one map
    (N, channels[l], H_l, W_l) a stage, the sizes halving (rounded up) from H, and logits (N, K). With `preact=True` the
    maps are taken before their ReLU.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on `num_classes` below 1.

    Differences from the original:
        * Features are the maps of the stages only. The original adds the stem's map and the mean of the last map.
        * Averaging covers the whole last map, so any image size works; SSKD's and RepDistiller's 8 x 8 window needs
          32 x 32 images.

    Example:
        >>> import torch
        >>> features, logits = resnet8(num_classes=10)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)], (2, 10))

    Source: SSKD's `models/resnet.py` and `models/resnetv2.py`, which are RepDistiller's.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        planes: Sequence[int],
        stem_channels: int,
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        self.num_classes = num_classes
        self.channels = [width * block.expansion for width in planes]
        self._block, self._blocks, self._planes = block, tuple(blocks), tuple(planes)

        self.conv1 = nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self._stages = [f"layer{level + 1}" for level in range(len(planes))]
        for level, name in enumerate(self._stages):
            before = stem_channels if level == 0 else self.channels[level - 1]
            self.add_module(name, self._stage(level, before, 1 if level == 0 else 2))
        self.classifier_name = "fc" if block is BasicBlock else "linear"
        self.add_module(self.classifier_name, nn.Linear(self.channels[-1], num_classes))
        initialise_convolutions(self)

    def _stage(self, level: int, in_channels: int, stride: int) -> ReLUSequential:
        block, planes, count = self._block, self._planes[level], self._blocks[level]
        others = (block(self.channels[level], planes) for _ in range(count - 1))
        return ReLUSequential(block(in_channels, planes, stride), *others)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last BatchNorm of each stage, finest first, for overhaul margins.

        Example:
            >>> [batch_norm.num_features for batch_norm in resnet8().get_bn_before_relu()]
            [16, 32, 64]
        """
        name = "bn2" if self._block is BasicBlock else "bn3"
        blocks = (getattr(self, stage)[-1] for stage in self._stages)
        return [getattr(block, name) for block in blocks]

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the stages after l, the last one the last stage at stride 1."""
        extractors = remaining_stages(self.channels, self._stage, ReLUSequential)
        classifier = AuxiliaryClassifier(extractors, self.channels[-1], num_classes, final_relu=True)
        initialise_convolutions(classifier)
        if self._block is BasicBlock:
            initialise_linears(classifier)
        return classifier

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, self.conv1.in_channels)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        features = []
        for name in self._stages:
            before_relu = getattr(self, name)(x)
            x = F.relu(before_relu)
            features.append(before_relu if preact else x)
        return features, getattr(self, self.classifier_name)(x.mean(dim=(2, 3)))


def _basic(depth: int, num_classes: int, widen: int = 1) -> CIFARResNet:
    """6 * n + 2 layers: three stages of n blocks."""
    planes = [16 * widen, 32 * widen, 64 * widen]
    return CIFARResNet(BasicBlock, [(depth - 2) // 6] * 3, planes, 16 if widen == 1 else 32, num_classes)


@register_model
def resnet8(num_classes: int = 100) -> CIFARResNet:
    """ResNet-8 for 32 x 32 images.

    Example:
        >>> resnet8(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(8, num_classes)


@register_model
def resnet14(num_classes: int = 100) -> CIFARResNet:
    """ResNet-14 for 32 x 32 images.

    Example:
        >>> resnet14(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(14, num_classes)


@register_model
def resnet20(num_classes: int = 100) -> CIFARResNet:
    """ResNet-20 for 32 x 32 images.

    Example:
        >>> resnet20(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(20, num_classes)


@register_model
def resnet32(num_classes: int = 100) -> CIFARResNet:
    """ResNet-32 for 32 x 32 images.

    Example:
        >>> resnet32(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(32, num_classes)


@register_model
def resnet44(num_classes: int = 100) -> CIFARResNet:
    """ResNet-44 for 32 x 32 images.

    Example:
        >>> resnet44(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(44, num_classes)


@register_model
def resnet56(num_classes: int = 100) -> CIFARResNet:
    """ResNet-56 for 32 x 32 images.

    Example:
        >>> resnet56(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(56, num_classes)


@register_model
def resnet110(num_classes: int = 100) -> CIFARResNet:
    """ResNet-110 for 32 x 32 images.

    Example:
        >>> resnet110(num_classes=10).channels
        [16, 32, 64]
    """
    return _basic(110, num_classes)


@register_model
def resnet8x4(num_classes: int = 100) -> CIFARResNet:
    """ResNet-8, four times as wide, for 32 x 32 images.

    Example:
        >>> resnet8x4(num_classes=10).channels
        [64, 128, 256]
    """
    return _basic(8, num_classes, widen=4)


@register_model
def resnet32x4(num_classes: int = 100) -> CIFARResNet:
    """ResNet-32, four times as wide, for 32 x 32 images.

    Example:
        >>> resnet32x4(num_classes=10).channels
        [64, 128, 256]
    """
    return _basic(32, num_classes, widen=4)


@register_model(aliases=["ResNet50"])
def cifar_resnet50(num_classes: int = 100) -> CIFARResNet:
    """ResNet-50 with a 3x3 stem of stride 1 and no max-pool, for 32 x 32 images.

    Example:
        >>> cifar_resnet50(num_classes=10).channels
        [256, 512, 1024, 2048]
    """
    return CIFARResNet(Bottleneck, [3, 4, 6, 3], [64, 128, 256, 512], 64, num_classes)
