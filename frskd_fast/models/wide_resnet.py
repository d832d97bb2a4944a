"""The wide residual network of FRSKD.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, in the form FRSKD uses (Ji et al., CVPR 2021).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions
from .registry import register_model


class WideBlock(nn.Module):
    """x -> s(x) + conv2(relu(bn2(conv1(relu(x))))); s(x) is x, or convShortcut(relu(x)) where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if stride != 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(rectified))))
        return out + (x if self.convShortcut is None else self.convShortcut(rectified))


class WideGroup(nn.Module):
    """Blocks of one width, one behind the other; the first carries the stride."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            WideBlock(in_channels, out_channels, stride),
            *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """features_l = relu(bn_l(group_l(.))) for three groups; logits = fc(mean over pixels of features_3).

    Group l + 1 reads bn_l's output; its first block applies the ReLU.

    Args:
        depth: number of layers, 6 * n + 4 for n blocks in a group.
        widen_factor: groups are 16, 32 and 64 times this many channels wide.
        num_classes: number of logits, K.
        original_preact: with `preact=True`, hand out the last map after its ReLU, as the original's in-place ReLU
            does (see below). It changes nothing else.

    Attributes:
        channels: channels of each feature map, finest first; build the self-teacher with it.
        classifier_name: name of the linear layer, "fc".

    Calling `model(images, preact=False)` with images (N, 3, H, W), floating point, returns `(features, logits)`:
    three maps (N, channels[l], H_l, W_l), the sizes halving (rounded up) from H, and logits (N, K). With
    `preact=True` the maps are taken before their last ReLU.

    Raises:
        ValueError, TypeError: on images of another rank, channel count or integer type; on a depth that is not
            6 * n + 4; on a `num_classes` or `widen_factor` below 1.

    Differences from the original:
        * With `preact=True` all three maps are before their ReLU. In the original an in-place ReLU overwrites the
          last one, whose smallest value is then exactly 0. `original_preact=True` brings that back.
        * Averaging covers the whole last map, so any image size works; the original's 8x8 window needs 32 x 32 images.
        * `bn1` is part of the state dict and of `named_parameters()`, as in the original, but nothing uses it. Here it
          does not require gradients, so that DistributedDataParallel does not wait for them. It never changes in
          either.
        * `get_bn_before_relu` works; in the original it raises AttributeError.

    Example:
        >>> import torch
        >>> features, logits = WideResNet(depth=10, widen_factor=1, num_classes=7)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)], (2, 7))

    Source: Zagoruyko & Komodakis, BMVC 2016; one BatchNorm a group instead of one a block is FRSKD's.
    """

    def __init__(
        self, depth: int = 16, widen_factor: int = 2, num_classes: int = 100, original_preact: bool = False
    ) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        check_positive_integer("widen_factor", widen_factor)
        check_positive_integer("depth", depth)
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6 * n + 4 for n >= 1 blocks in a group (10, 16, 22, ...), but is {depth}.")
        blocks = (depth - 4) // 6
        self.num_classes = num_classes
        self.original_preact = original_preact
        self.channels = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(blocks, 16, self.channels[0], stride=1)
        self.block1bn = nn.BatchNorm2d(self.channels[0])
        self.block2 = WideGroup(blocks, self.channels[0], self.channels[1], stride=2)
        self.block2bn = nn.BatchNorm2d(self.channels[1])
        self.block3 = WideGroup(blocks, self.channels[1], self.channels[2], stride=2)
        self.block3bn = nn.BatchNorm2d(self.channels[2])
        # Unused, see "Differences from the original"; checkpoints carry it.
        self.bn1 = nn.BatchNorm2d(self.channels[2]).requires_grad_(False)
        self.classifier_name = "fc"
        self.fc = nn.Linear(self.channels[2], num_classes)

        initialise_convolutions(self)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that makes each pre-activation feature map, finest first, for overhaul margins.

        Example:
            >>> [batch_norm.num_features for batch_norm in wrn16x2().get_bn_before_relu()]
            [32, 64, 128]
        """
        return [self.block1bn, self.block2bn, self.block3bn]

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        check_images(images, self.conv1.in_channels)
        first = self.block1bn(self.block1(self.conv1(images)))
        second = self.block2bn(self.block2(first))
        third = self.block3bn(self.block3(second))
        before_relu = [first, second, third]
        features = [F.relu(feature) for feature in before_relu]
        logits = self.fc(features[-1].mean(dim=(2, 3)))
        if not preact:
            return features, logits
        if self.original_preact:
            before_relu[-1] = features[-1]
        return before_relu, logits


@register_model
def wrn16x2(num_classes: int = 100, original_preact: bool = False) -> WideResNet:
    """WRN-16-2 for 32 x 32 images: 703,060 parameters for 100 classes. `original_preact`: see `WideResNet`.

    Example:
        >>> wrn16x2(num_classes=10).channels
        [32, 64, 128]
    """
    return WideResNet(16, 2, num_classes, original_preact)
