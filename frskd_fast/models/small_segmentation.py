"""A segmentation network for images of about a hundred pixels, small enough to train on a CPU within minutes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .registry import register_model
from .residual_blocks import BasicBlock
from .segmentation import SegmentationNetwork

CHANNELS = (16, 32, 64, 96)


class ResNet10Maps(nn.Module):
    """Feature maps of strides 2, 4, 8 and 16: a convolution of stride 2 and four stages of one residual block each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        before = (CHANNELS[0], *CHANNELS)
        self.blocks = nn.ModuleList(
            BasicBlock(*channels, stride=1 if stage == 0 else 2)
            for stage, channels in enumerate(zip(before, CHANNELS, strict=False))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [F.relu(self.bn1(self.conv1(images)))]
        for block in self.blocks:
            maps.append(F.relu(block(maps[-1])))
        return maps[1:]


@register_model
def resnet10_seg(num_classes: int = 11) -> SegmentationNetwork:
    """`SegmentationNetwork` on a narrow ResNet of ten layers; class scores (N, K, H/2, W/2).

    Example:
        >>> import torch
        >>> resnet10_seg(num_classes=5).eval().student_maps(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 32, 48])
    """
    return SegmentationNetwork(
        ResNet10Maps(),
        num_classes,
        width=32,
        levels=[0, 1, 2, 3],
        student_layers=1,
        teacher_layers=2,
        head_width=48,
        image_shape=(3, 64, 64),
    )
