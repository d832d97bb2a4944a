"""FRSKD's segmentation network: EfficientNet, two bidirectional feature pyramids, and a segmentation head on each.

Ji et al., CVPR 2021 (arXiv 2103.08273), section 4.2; Tan et al., "EfficientDet", CVPR 2020.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._checks import check_images
from .efficientnet import build_stages, names_in_files
from .recomputed import AffineNormReLU
from .registry import register_model

LEVELS = range(2, 8)  # P2 to P7: level l has stride 2^l
PYRAMID_WIDTHS = (64, 88, 112)  # of d0, d1, d2
# The blocks of EfficientNet in layer1 to layer5: of B0, B1, B2.
GROUPS = ((2, 2, 2, 6, 4), (3, 3, 3, 3, 11), (3, 3, 3, 3, 11))
STUDENT_LAYERS, TEACHER_LAYERS = 3, 2
HEAD_WIDTH = 256
MINIMUM_SIDE = 32
EPSILON, MOMENTUM = 1e-4, 0.997  # of the BatchNorms outside backbone and pyramids


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, eps: float = 1e-5, momentum: float = 0.1
) -> nn.Sequential:
    """relu(bn(convolution(x)))."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2),
        nn.BatchNorm2d(out_channels, eps, momentum),
        nn.ReLU(),
    )


def segmentation_head(
    channels: int, width: int, num_classes: int, eps: float = 1e-5, momentum: float = 0.1
) -> nn.Sequential:
    """The class maps of a feature map, at its size: 3x3 convolution, BatchNorm, ReLU, 3x3 convolution."""
    return nn.Sequential(
        *convolution(channels, width, 3, 1, eps, momentum), nn.Conv2d(width, num_classes, 3, padding=1)
    )


def top_down(laterals: Sequence[Tensor]) -> list[Tensor]:
    """p_L = l_L, p_i = l_i + enlarge(p_{i+1}), bilinear: a feature pyramid from maps of one width, finest first."""
    pyramid = [laterals[-1]]
    for own in reversed(laterals[:-1]):
        pyramid.insert(0, enlarged(pyramid[0], own) + own)
    return pyramid


def enlarged(coarser: Tensor, finer: Tensor, original_resizing: bool = False) -> Tensor:
    """`coarser` at the size of `finer`, bilinear; with `original_resizing` enlarged both ways by the ratio of the widths."""
    if not original_resizing:
        return F.interpolate(coarser, size=finer.shape[2:], mode="bilinear", align_corners=False)
    ratio = finer.shape[3] / coarser.shape[3]
    out = F.interpolate(coarser, scale_factor=ratio, mode="bilinear", align_corners=False)
    if out.shape[3] != finer.shape[3] or out.shape[2] not in (1, finer.shape[2]):
        raise ValueError(
            f"original_resizing=True makes {tuple(out.shape[2:])} of a map of {tuple(coarser.shape[2:])}, but the next one is "
            f"{tuple(finer.shape[2:])}; give images whose sides are both the same multiple of 32, or leave "
            "original_resizing out."
        )
    return out


class BiFPNSeg(nn.Module):
    """U_L = node(P_L), U_k = node(P_k + enlarge(U_{k+1})); T_2 = U_2, T_k = node(P_k + U_k + reduce(T_{k-1})); k = 2 ... L.

    `enlarge` is bilinear and `reduce` takes the nearest neighbour, both to the size of level k; a node is
    `relu(bn(weight * x + bias))`.

    Args:
        channels: of every map.
        is_last: give the maps U and leave the way down out.
        original_resizing: see `EfficientDetSeg`.
        levels: number of maps, L - 1.

    Calling `layer(maps)` with the maps P_2 to P_L, finest first and of any sizes, returns T_2 to T_L.
    """

    def __init__(
        self, channels: int, is_last: bool = False, original_resizing: bool = False, levels: int = len(LEVELS)
    ) -> None:
        super().__init__()
        self.is_last = is_last
        self.original_resizing = original_resizing
        self.levels = range(2, 2 + levels)
        for level in reversed(self.levels):
            self.add_module(f"conv{level}up", AffineNormReLU(channels))
        for level in () if is_last else self.levels[1:]:
            self.add_module(f"conv{level}dw", AffineNormReLU(channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        up: list[Tensor] = []
        for level, own in zip(reversed(self.levels), reversed(maps), strict=True):
            total = own + enlarged(up[0], own, self.original_resizing) if up else own
            up.insert(0, getattr(self, f"conv{level}up")(total))
        if self.is_last:
            return up
        out = [up[0]]
        for level, own, above in zip(self.levels[1:], maps[1:], up[1:], strict=True):
            finer = F.interpolate(out[-1], size=above.shape[2:], mode="nearest")
            out.append(getattr(self, f"conv{level}dw")(own + above + finer))
        return out


class EfficientDetSeg(nn.Module):
    """student_maps = classifier1(BiFPN1(neck(images))_2); teacher_maps = classifier2(BiFPN2(BiFPN1(...))_2).

    4,327,590, 7,127,946 and 8,592,940 parameters for compound 0, 1 and 2 and 21 classes.

    Args:
        compound: 0, 1 or 2: EfficientNet-B0, B1 or B2, and a pyramid of 64, 88 or 112 channels.
        num_classes: K.
        original_resizing: enlarge the pyramid's maps both ways by the ratio of their widths, as the original does. Off, they
            are brought to the size of the next level, which is the same on square images whose side is a multiple of 128
            and, unlike the original, right on all others.

    Attributes:
        num_classes: K.
        feature_channels: channels of each of the feature maps.
        names_of_part: for the files of other programs that hold the backbone alone, a name in the file for each of its
            tensors; `load_backbone_weights` reads them.

    Calling `network(images)` with images (N, 3, H, W), floating point, of 32 pixels a side or more, returns
    `(student_feats, teacher_feats, student_maps, teacher_maps)`: six maps each of strides 4 to 128 (P2 to P7), and logits
    (N, K, h, w) at stride 4. `losses.SegmentationLoss` takes these four in this order, `F.interpolate(student_maps,
    images.shape[2:], mode="bilinear")` is what the original returns. `network.student_maps(images)` gives the student's logits
    without running the self-teacher.

    Raises:
        ValueError, TypeError: on images of another rank, channel count, integer type or below 32 pixels; on another
            `compound`.

    Differences from the original:
        * Any image size works, see `original_resizing`.
        * The weights of the backbone are random. `load_backbone_weights` takes ImageNet's from a file of efficientnet-pytorch
          or timm; nothing is downloaded.
        * The maps stay at stride 4; the original enlarges them to the images' size at the end of the forward pass.
        * The convolutions `smooth1` and `smooth2`, which the original registers and never calls, do not require gradients,
          so that DistributedDataParallel does not wait for them.

    As in the original, no activation follows the stem, drop-connect is off, and zero padding is that for images of 224, 240
    or 260 pixels a side.

    Example:
        >>> import torch
        >>> _, _, student_maps, _ = EfficientDetSeg(num_classes=5).eval()(torch.zeros(1, 3, 64, 96))
        >>> tuple(student_maps.shape)
        (1, 5, 16, 24)

    Source: Ji et al., CVPR 2021, section 4.2 and its released code.
    """

    def __init__(self, compound: int = 0, num_classes: int = 21, original_resizing: bool = False) -> None:
        super().__init__()
        if isinstance(compound, bool) or compound not in range(len(GROUPS)):
            raise ValueError(f"compound is {compound!r}, but 0, 1 or 2 was wanted.")
        check_positive_integer("num_classes", num_classes)
        self.compound = compound
        self.num_classes = num_classes
        self.original_resizing = original_resizing
        stages = build_stages(compound)
        width = PYRAMID_WIDTHS[compound]
        self.feature_channels = [width] * len(LEVELS)

        self.layer0 = stages.stem
        ends = list(itertools.accumulate(GROUPS[compound]))
        groups = [nn.Sequential(*stages.blocks[start:end]) for start, end in itertools.pairwise([0, *ends])]
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = groups
        blocks = [f"layer{number}.{place}" for number, group in enumerate(groups, 1) for place in range(len(group))]
        self.names_of_part = names_in_files(stages, "layer0", blocks)
        stride4, stride8, stride16, _, stride32 = (stages.channels[end - 1] for end in ends)
        block = functools.partial(convolution, eps=EPSILON, momentum=MOMENTUM)
        self.conv6 = block(stride32, width, 3, stride=2)
        self.conv7 = block(width, width, 3, stride=2)
        self.toplayer = block(stride32, width, 1)
        # Registered and never called by the original.
        self.smooth1 = block(width, width, 3).requires_grad_(False)
        self.smooth2 = block(width, width, 3).requires_grad_(False)
        self.latlayer1 = block(stride16, width, 1)
        self.latlayer2 = block(stride8, width, 1)
        self.latlayer3 = block(stride4, width, 1)
        self.BiFPN1 = nn.Sequential(
            *(BiFPNSeg(width, original_resizing=original_resizing) for _ in range(STUDENT_LAYERS))
        )
        self.BiFPN2 = nn.Sequential(
            *(BiFPNSeg(width, layer == TEACHER_LAYERS - 1, original_resizing) for layer in range(TEACHER_LAYERS))
        )
        self.classifier1 = segmentation_head(width, HEAD_WIDTH, num_classes, EPSILON, MOMENTUM)
        self.classifier2 = segmentation_head(width, HEAD_WIDTH, num_classes, EPSILON, MOMENTUM)

    def neck(self, images: Tensor) -> list[Tensor]:
        """P2 to P7 before the pyramids: from the backbone's maps."""
        check_images(images, 3)
        if min(images.shape[2:]) < MINIMUM_SIDE:
            raise ValueError(
                f"images must have {MINIMUM_SIDE} pixels a side or more, but have shape {tuple(images.shape)}; enlarge them."
            )
        maps = [self.layer0(images)]
        for group in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            maps.append(group(maps[-1]))
        p6 = self.conv6(maps[5])
        laterals = (self.latlayer3(maps[1]), self.latlayer2(maps[2]), self.latlayer1(maps[3]), self.toplayer(maps[5]))
        return [*top_down(laterals), p6, self.conv7(p6)]

    def student_maps(self, images: Tensor) -> Tensor:
        """The student's logits (N, K, h, w) at stride 4, without the self-teacher."""
        maps: Tensor = self.classifier1(self.BiFPN1(self.neck(images))[0])
        return maps

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        student = self.BiFPN1(self.neck(images))
        teacher = self.BiFPN2(student)
        return student, teacher, self.classifier1(student[0]), self.classifier2(teacher[0])


@register_model
def efficientdet_seg_d0(num_classes: int = 21, original_resizing: bool = False) -> EfficientDetSeg:
    """FRSKD's segmentation network on EfficientNet-B0.

    Example:
        >>> efficientdet_seg_d0(num_classes=5).feature_channels
        [64, 64, 64, 64, 64, 64]
    """
    return EfficientDetSeg(0, num_classes, original_resizing)


@register_model
def efficientdet_seg_d1(num_classes: int = 21, original_resizing: bool = False) -> EfficientDetSeg:
    """FRSKD's segmentation network on EfficientNet-B1."""
    return EfficientDetSeg(1, num_classes, original_resizing)


@register_model
def efficientdet_seg_d2(num_classes: int = 21, original_resizing: bool = False) -> EfficientDetSeg:
    """FRSKD's segmentation network on EfficientNet-B2."""
    return EfficientDetSeg(2, num_classes, original_resizing)
