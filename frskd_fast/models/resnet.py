"""Residual networks that hand out the feature map of every stage next to the logits.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, as used by FRSKD (Ji et al., CVPR 2021).
"""

import warnings
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions
from .auxiliary import AuxiliaryClassifier, remaining_stages
from .registry import register_model
from .residual_blocks import shortcut

# Up to this many pixels a side, a stem that divides the size by four leaves almost nothing to the last stages.
SMALL_IMAGE_SIDE = 64


class BasicBlock(nn.Module):
    """x -> s(relu(x)) + bn2(conv2(relu(bn1(conv1(relu(x)))))), with two 3x3 convolutions and s the shortcut.

    The ReLU that usually closes a block opens the next one, so that a stage ends before its activation.
    """

    expansion = 1
    other_names: ClassVar = {"shortcut": "downsample"}  # mdistiller, for one

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """As `BasicBlock`, with a 1x1, a 3x3 (which carries the stride) and a 1x1 convolution to 4 * planes channels."""

    expansion = 4
    other_names: ClassVar = BasicBlock.other_names

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """features_l = relu(stage_l(features_{l-1})) for four stages; logits = fc(mean over pixels of features_4).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        num_classes: number of logits, K.
        stem: "cifar" is a 3x3 convolution of stride 1; "imagenet" a 7x7 convolution of stride 2 and a max-pool of
            stride 2. The layout of parameters and their names are those of torchvision, whose checkpoints load.

    Attributes:
        channels: channels of each feature map, finest first; build the self-teacher with it.
        classifier_name: name of the linear layer, "fc".

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`:
    four maps (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H for the CIFAR stem and from H / 4 for
    the ImageNet stem, and logits (N, K). With `preact=True` the maps are taken before their last ReLU.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on `num_classes` below 1.

    Differences from the original:
        * No operation writes into its input, so the maps of `preact=True` stay as they were computed.
        * Averaging covers the whole last map, so any image size works.
        * An ImageNet stem warns once when images have a side of 64 pixels or fewer (not while torch.compile traces).

    Example:
        >>> import torch
        >>> features, logits = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=7)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)], (2, 7))

    Source: He et al., CVPR 2016; the split of stages before their ReLU is FRSKD's, Ji et al., CVPR 2021.
    """

    other_names: ClassVar = {"linear": "fc"}

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 100,
        stem: Literal["cifar", "imagenet"] = "cifar",
    ) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", but is {stem!r}.')
        if len(layers) != 4:
            raise ValueError(f"layers must hold the number of blocks of four stages, but is {layers!r}.")
        for stage, blocks in enumerate(layers):
            check_positive_integer(f"layers[{stage}]", blocks)
        self.num_classes = num_classes
        self.stem = stem
        self.channels = [planes * block.expansion for planes in (64, 128, 256, 512)]
        self._warned_of_small_images = False

        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self._block, self._layers = block, layers
        self.layer1 = self._stage(0, 64, stride=1)
        self.layer2 = self._stage(1, self.channels[0], stride=2)
        self.layer3 = self._stage(2, self.channels[1], stride=2)
        self.layer4 = self._stage(3, self.channels[2], stride=2)
        self.classifier_name = "fc"
        self.fc = nn.Linear(self.channels[3], num_classes)

        # The CIFAR network keeps PyTorch's own initialisation, as the original does.
        if stem == "imagenet":
            initialise_convolutions(self)

    def _stage(self, level: int, in_channels: int, stride: int) -> nn.Sequential:
        block, channels, count = self._block, self.channels[level], self._layers[level]
        planes = channels // block.expansion
        return nn.Sequential(block(in_channels, planes, stride), *(block(channels, planes) for _ in range(count - 1)))

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier:
        """HSAKD's heads: head l repeats the stages after l, the last one the last stage at stride 1."""
        extractors = remaining_stages(self.channels, self._stage)
        classifier = AuxiliaryClassifier(extractors, self.channels[-1], num_classes, final_relu=True)
        initialise_convolutions(classifier)
        return classifier

    def _warn_of_small_images(self, height: int, width: int) -> None:
        if self._warned_of_small_images or min(height, width) > SMALL_IMAGE_SIDE:
            return
        self._warned_of_small_images = True
        warnings.warn(
            f"This network's ImageNet stem divides the image side by 4 before the first stage, and got images of "
            f"{height} x {width} pixels; on such images it loses many points of accuracy: use cifarresnet18, "
            f"whose stem keeps the full size.",
            UserWarning,
            # The line that called the model, past this method, forward and the two call methods of nn.Module.
            stacklevel=5,
        )

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, self.conv1.in_channels)
        # A warning would break a compiled graph.
        if self.stem == "imagenet" and not torch.compiler.is_compiling():
            self._warn_of_small_images(images.shape[2], images.shape[3])

        x = self.bn1(self.conv1(images))
        if self.stem == "imagenet":
            # The first block applies the stem's ReLU: a maximum and a ReLU may change places.
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        before_relu = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            before_relu.append(x)
        features = [F.relu(feature) for feature in before_relu]
        logits = self.fc(features[-1].mean(dim=(2, 3)))
        return (before_relu if preact else features), logits


@register_model
def cifarresnet18(num_classes: int = 100) -> ResNet:
    """ResNet-18 for 32 x 32 images: a 3x3 stem of stride 1, no max-pool; 11,220,132 parameters for 100 classes.

    This is the network of FRSKD's CIFAR-100 and Tiny-ImageNet (32 px) results.

    Example:
        >>> cifarresnet18(num_classes=10).channels
        [64, 128, 256, 512]
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem="cifar")


@register_model(aliases=["resnet18_imagenet"])
def resnet18(num_classes: int = 1000) -> ResNet:
    """ResNet-18 for 224 x 224 images, with torchvision's parameter names.

    Example:
        >>> resnet18().channels
        [64, 128, 256, 512]
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem="imagenet")


@register_model(aliases=["resnet34_imagenet"])
def resnet34(num_classes: int = 1000) -> ResNet:
    """ResNet-34 for 224 x 224 images, with torchvision's parameter names.

    Example:
        >>> resnet34().channels
        [64, 128, 256, 512]
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, stem="imagenet")


@register_model(aliases=["resnet50_imagenet"])
def resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50 for 224 x 224 images (stride on the 3x3 convolution), with torchvision's parameter names.

    Example:
        >>> resnet50().channels
        [256, 512, 1024, 2048]
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stem="imagenet")
