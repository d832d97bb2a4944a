"""FFL's networks: two ResNets with a shared trunk, and the module that fuses the last maps of several networks.

Kim et al., "Feature Fusion for Online Mutual Knowledge Distillation", ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from ._initialisers import initialise_convolutions
from .cifar_resnet import CIFARResNet
from .residual_blocks import BasicBlock, ReLUSequential

PLANES = (16, 32, 64)


class FFLResNet(nn.Module):
    """z_s = W_s mean over pixels of f_s + b_s, f_s = relu(layer3_s(trunk(images))): two CIFAR ResNets that share two stages.

    Args:
        depth: number of layers of each of the two, 6 * n + 2 with n blocks in a stage.
        num_classes: number of logits, K.

    Attributes:
        channels: channels of the two maps, [64, 64].
        num_classes: K.

    Calling `model(images)` with images (N, 3, H, W), floating point, returns `([z_1, z_2], [f_1, f_2])`: logits (N, K) and
    the last maps (N, 64, H/4, W/4), sizes rounded up. With `pyramids=True` there is instead of each map the list of all maps
    of its network, finest first, of which the first two are shared. Names of parameters are those of the original's
    checkpoints, whose classifiers are called `classfier3_1` and `classfier3_2`.

    Raises:
        ValueError, TypeError: on another depth; on images of another rank, channel count or integer type.

    Differences from the original:
        * It returns `(z_1, z_2, [f_1, f_2])`.
        * Averaging covers the whole map, so any image size works; the original's 8 x 8 window needs 32 x 32 images.

    Example:
        >>> import torch
        >>> logits, maps = FFLResNet(8, num_classes=10)(torch.zeros(2, 3, 32, 32))
        >>> [tuple(z.shape) for z in logits], [tuple(f.shape) for f in maps]
        ([(2, 10), (2, 10)], [(2, 64, 8, 8), (2, 64, 8, 8)])

    Source: the networks of FFL-pytorch: 832,920 parameters at depth 32 for 100 classes, where one ResNet-32 has 472,756.
    """

    def __init__(self, depth: int = 32, num_classes: int = 100) -> None:
        super().__init__()
        check_positive_integer("depth", depth)
        check_positive_integer("num_classes", num_classes)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}, but 6 * n + 2 with n >= 1 was wanted: 8, 14, 20, 26, 32, ...")
        self.depth = depth
        self.num_classes = num_classes
        self.channels = [PLANES[-1]] * 2
        self.conv1 = nn.Conv2d(3, PLANES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(PLANES[0])
        self.layer1 = self._stage(PLANES[0], PLANES[0], 1)
        self.layer2 = self._stage(PLANES[0], PLANES[1], 2)
        self.layer3_1 = self._stage(PLANES[1], PLANES[2], 2)
        self.layer3_2 = self._stage(PLANES[1], PLANES[2], 2)
        self.classfier3_1 = nn.Linear(PLANES[2], num_classes)
        self.classfier3_2 = nn.Linear(PLANES[2], num_classes)
        initialise_convolutions(self)
        self._alone: dict[int, CIFARResNet] = {}  # no submodules: their parameters are those above

    @property
    def _blocks(self) -> int:
        return (self.depth - 2) // 6

    def _stage(self, in_channels: int, planes: int, stride: int) -> ReLUSequential:
        others = (BasicBlock(planes, planes) for _ in range(self._blocks - 1))
        return ReLUSequential(BasicBlock(in_channels, planes, stride), *others)

    def forward(self, images: Tensor, pyramids: bool = False) -> tuple[list[Tensor], list[Any]]:
        check_images(images, self.conv1.in_channels)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        first = F.relu(self.layer1(x), inplace=True)
        second = F.relu(self.layer2(first), inplace=True)
        maps = [F.relu(stage(second), inplace=True) for stage in (self.layer3_1, self.layer3_2)]
        classifiers = (self.classfier3_1, self.classfier3_2)
        logits = [classify(f.mean(dim=(2, 3))) for classify, f in zip(classifiers, maps, strict=True)]
        return logits, [[first, second, f] for f in maps] if pyramids else maps

    def subnetwork(self, index: int) -> CIFARResNet:
        """Sub-network 0 or 1 alone, a ResNet of this depth that shares the modules.

        Its names are those of `frskd_fast.models.resnet32` and its kind, so that its `state_dict()` loads into one.

        Example:
            >>> network = FFLResNet(8, num_classes=10)
            >>> network.subnetwork(1).fc is network.classfier3_2
            True
        """
        if index not in (0, 1):
            raise ValueError(f"index is {index!r}, but 0 or 1, one of two sub-networks, was wanted.")
        if index not in self._alone:
            with torch.device("meta"):
                self._alone[index] = CIFARResNet(BasicBlock, [self._blocks] * 3, PLANES, PLANES[0], self.num_classes)
        network = self._alone[index]
        for name in ("conv1", "bn1", "layer1", "layer2"):
            setattr(network, name, getattr(self, name))
        network.layer3 = getattr(self, f"layer3_{index + 1}")
        network.fc = getattr(self, f"classfier3_{index + 1}")
        network.training = self.training
        return network


class FusionModule(nn.Module):
    """logits = W mean over pixels of relu(bn1_1(conv1_1(relu(bn1(conv1(cat(f_1, ..., f_S))))))) + b.

    `conv1` is a depthwise 3x3 convolution of all maps side by side, `conv1_1` a 1x1 convolution to as many channels as the
    widest map has. Maps of unlike size are average-pooled to the smallest height and width first.

    Args:
        channels: channels C_1, ..., C_S of S >= 2 maps; a single number for two maps of as many channels each.
        num_classes: number of logits, K.
        spatial: the original's pooling window, kept so that its calls work. The mean here covers the whole map, which for
            maps of that size is the same.

    Attributes:
        channels: those of the maps, a list.
        num_classes: K.

    Calling `fusion(f_1, ..., f_S)`, or `fusion([f_1, ..., f_S])`, with maps (N, C_s, H_s, W_s) returns logits (N, K).
    Gradients reach the maps. Names of parameters are those of the original's checkpoints.

    Raises:
        ValueError, TypeError: on fewer than two maps, on maps of other channels, rank or batch, and in training mode on a
            single pixel, of which BatchNorm has no variance.

    Example:
        >>> import torch
        >>> fusion = FusionModule([64, 128], num_classes=10)
        >>> fusion(torch.zeros(2, 64, 16, 16), torch.zeros(2, 128, 8, 8)).shape, tuple(fusion.conv1.weight.shape)
        (torch.Size([2, 10]), (192, 1, 3, 3))

    Source: the fusion module of FFL-pytorch (16,228 parameters for 64 channels and 100 classes). More than two maps, other
    channels and sizes are this library's.
    """

    def __init__(self, channels: int | Sequence[int], num_classes: int, spatial: int = 8) -> None:
        super().__init__()
        widths = [channels] * 2 if isinstance(channels, int) else list(channels)
        if len(widths) < 2:
            raise ValueError(
                f"channels lists {len(widths)} maps, but at least two were wanted: one has nothing to fuse with."
            )
        for index, width in enumerate(widths):
            check_positive_integer(f"channels[{index}]", width)
        check_positive_integer("num_classes", num_classes)
        check_positive_integer("spatial", spatial)
        self.channels = widths
        self.num_classes = num_classes
        together, out = sum(widths), max(widths)
        self.fc2 = nn.Linear(out, num_classes)  # registered first, as in the original
        self.conv1 = nn.Conv2d(together, together, 3, padding=1, groups=together, bias=False)
        self.bn1 = nn.BatchNorm2d(together)
        self.conv1_1 = nn.Conv2d(together, out, 1, bias=False)
        self.bn1_1 = nn.BatchNorm2d(out)
        initialise_convolutions(self)

    def forward(self, *maps: Tensor | Sequence[Tensor]) -> Tensor:
        given: Any = maps[0] if len(maps) == 1 and isinstance(maps[0], list | tuple) else maps
        x = torch.cat(self._of_one_size(given), 1)
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                f"maps hold one image of one pixel ({tuple(x.shape)} side by side), but BatchNorm needs more than one value "
                "of each channel in training mode; give more images a batch, or call .eval()."
            )
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn1_1(self.conv1_1(x)), inplace=True)
        logits: Tensor = self.fc2(x.mean(dim=(2, 3)))
        return logits

    def _of_one_size(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps, checked, each average-pooled to the smallest height and width among them."""
        if len(maps) != len(self.channels):
            raise ValueError(f"maps are {len(maps)}, but {len(self.channels)}, one of each network, were wanted.")
        for index, (feature, width) in enumerate(zip(maps, self.channels, strict=True)):
            if not isinstance(feature, Tensor):
                raise TypeError(f"maps[{index}] is a {type(feature).__name__}, but a torch.Tensor was wanted.")
            if feature.dim() != 4 or feature.shape[1] != width or feature.shape[0] != maps[0].shape[0]:
                raise ValueError(
                    f"maps[{index}] has shape {tuple(feature.shape)}, but a map (N, {width}, H, W) with the images of maps[0] "
                    "was wanted; networks whose features are no maps have nothing that can be fused here."
                )
        size = min(f.shape[2] for f in maps), min(f.shape[3] for f in maps)
        return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in maps]

    def extra_repr(self) -> str:
        """What is fused, shown by ``print(module)``."""
        return f"channels={self.channels}, num_classes={self.num_classes}"
