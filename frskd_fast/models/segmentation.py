"""Any network that gives feature maps as a segmentation network with a self-teacher, after FRSKD's own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from .dry_pass import dry_pass
from .efficientdet_seg import BiFPNSeg, convolution, segmentation_head, top_down
from .pyramid import describe_sizes

# The finest map that is used where nothing is said: FRSKD's student predicts at a quarter of the images' size.
FINEST_STRIDE = 4
# Of the dry pass: most networks keep apart what they do at strides up to 32, and none takes this for small images.
SIDES = (96, 64, 32, 224)


class SegmentationNetwork(nn.Module):
    """student_maps = head(pyramid(top_down(maps))_1); teacher_maps = head(pyramid'(pyramid(...))_1), of any network's maps.

    The parts are those of `EfficientDetSeg`: a 1x1 convolution for each map and a way down (bilinear), `student_layers`
    pyramid layers for the student, `teacher_layers` above them for the self-teacher, and a head on the finest map of each.

    Args:
        backbone: a network that is called as `backbone(images)` and returns two maps (N, C, H, W) or more, finest first: in a
            list, tuple or dict, or as `(features, logits)`. It is used, not copied. Read are, among others:

            | network | how it is made |
            | --- | --- |
            | of this library | `create_model("resnet18")`, `adapt_backbone(...)` |
            | timm's | `timm.create_model(name, features_only=True)` |
            | torchvision's | `create_feature_extractor(model, [...])`, `IntermediateLayerGetter(model, {...})` |
            | segmentation_models_pytorch's | `get_encoder(name)`, or a model's `.encoder` |

        num_classes: K.
        width: channels of every map of the pyramids.
        levels: positions of the maps to use among those that the backbone gives, finest first, two or more; None takes, of
            every size, the last map whose stride is 4 or more, or the two coarsest where there are fewer.
        student_layers, teacher_layers: pyramid layers of the student and, above them, of the self-teacher.
        head_width: channels between the two convolutions of a head.
        image_shape: (C, H, W) of the dry pass that finds the maps; None takes what a timm model says, else 96, 64, 32 and
            224 pixels a side.

    Attributes:
        backbone, num_classes: as given.
        levels: positions of the maps that are used.
        feature_channels: channels of each of the feature maps, `width`.

    Calling `network(images)` returns `(student_feats, teacher_feats, student_maps, teacher_maps)` as `EfficientDetSeg` does:
    a map (N, width, H_l, W_l) for each level twice, and logits (N, K, h, w) twice, at the size of the finest level.
    `network.student_maps(images)` gives the student's logits without running the self-teacher. Sizes need not halve: maps are
    resized to their neighbour's size. It is enough that no map is larger than the one before.

    Raises:
        TypeError: when the backbone returns one tensor, or no feature maps, saying what it returned.
        ValueError: on maps that do not shrink, naming their sizes; on `levels` that are not there.
        RuntimeError: when the backbone accepts none of the dry pass's images.

    Example:
        >>> import torch
        >>> from frskd_fast.models import SegmentationNetwork, resnet18
        >>> network = SegmentationNetwork(resnet18(), num_classes=5, width=16, head_width=32).eval()
        >>> student_feats, teacher_feats, student_maps, teacher_maps = network(torch.zeros(1, 3, 65, 97))
        >>> [tuple(feature.shape) for feature in student_feats]
        [(1, 16, 17, 25), (1, 16, 9, 13), (1, 16, 5, 7), (1, 16, 3, 4)]
        >>> tuple(student_maps.shape)
        (1, 5, 17, 25)

    Source: the structure of Ji et al., CVPR 2021, section 4.2, on other backbones; its BatchNorms have PyTorch's defaults.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        width: int = 64,
        *,
        levels: Sequence[int] | None = None,
        student_layers: int = 3,
        teacher_layers: int = 2,
        head_width: int = 256,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone is a {type(backbone).__name__}, but a torch.nn.Module was wanted.")
        numbers = {"num_classes": num_classes, "width": width, "head_width": head_width}
        for name, value in {**numbers, "student_layers": student_layers, "teacher_layers": teacher_layers}.items():
            check_positive_integer(name, value)
        self.backbone = backbone
        self.num_classes = num_classes
        self.levels, channels = _found_levels(backbone, levels, image_shape)
        self.feature_channels = [width] * len(channels)
        self.laterals = nn.ModuleList(convolution(count, width, 1) for count in channels)
        self.student_pyramid = nn.Sequential(*(BiFPNSeg(width, levels=len(channels)) for _ in range(student_layers)))
        self.teacher_pyramid = nn.Sequential(
            *(BiFPNSeg(width, layer == teacher_layers - 1, levels=len(channels)) for layer in range(teacher_layers))
        )
        self.student_head = segmentation_head(width, head_width, num_classes)
        self.teacher_head = segmentation_head(width, head_width, num_classes)

    def student_features(self, images: Tensor) -> list[Tensor]:
        """The student's pyramid: a map (N, width, H_l, W_l) for each level."""
        maps = maps_of(self.backbone, images)
        used = zip(self.laterals, self.levels, strict=True)
        features: list[Tensor] = self.student_pyramid(top_down([lateral(maps[level]) for lateral, level in used]))
        return features

    def student_maps(self, images: Tensor) -> Tensor:
        """The student's logits (N, K, h, w), without the self-teacher."""
        maps: Tensor = self.student_head(self.student_features(images)[0])
        return maps

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        student = self.student_features(images)
        teacher = self.teacher_pyramid(student)
        return student, teacher, self.student_head(student[0]), self.teacher_head(teacher[0])

    def extra_repr(self) -> str:
        """The levels, shown by ``print(module)``."""
        return f"num_classes={self.num_classes}, levels={self.levels}"


def maps_of(backbone: nn.Module, images: Tensor) -> list[Any]:
    """All that `backbone(images)` gives besides logits, in its order.

    Raises:
        TypeError: when it gives no list, tuple or mapping.
    """
    outputs = backbone(images)
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    if isinstance(outputs, list | tuple):
        features_and_logits = len(outputs) == 2 and isinstance(outputs[0], list | tuple)
        return list(outputs[0]) if features_and_logits else list(outputs)
    came = (
        f"one tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    )
    raise TypeError(
        f"backbone ({type(backbone).__name__}) returned {came}, but two or more feature maps, finest first, in a list or dict "
        "were wanted; give timm's create_model(..., features_only=True), torchvision's create_feature_extractor(model, nodes), "
        "an encoder of segmentation_models_pytorch, or adapt_backbone(model, layers)."
    )


def _found_levels(
    backbone: nn.Module, levels: Sequence[int] | None, image_shape: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The positions of the maps to use, and their channels, by a dry pass."""
    shapes: list[Any] = []

    def probe(images: Tensor) -> tuple[list[Any], Tensor]:
        shapes.append(images.shape)
        return maps_of(backbone, images), images

    outputs, _ = dry_pass(backbone, probe, image_shape, SIDES)
    image = shapes[-1]
    # An encoder of segmentation_models_pytorch gives the images themselves first, and some give maps without channels.
    maps = {
        position: output
        for position, output in enumerate(outputs)
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[1] > 0 and output.shape[1:] != image[1:]
    }
    if levels is not None:
        return _checked_levels(levels, maps, outputs)
    by_size = {output.shape[2:]: position for position, output in maps.items()}  # of every size the last
    positions = sorted(by_size.values())
    coarse = [position for position in positions if image[2] >= FINEST_STRIDE * maps[position].shape[2]]
    used = coarse if len(coarse) > 1 else positions[-2:]
    if len(used) < 2:
        raise TypeError(
            f"backbone ({type(backbone).__name__}) returned {len(outputs)} outputs ({describe_sizes(outputs)}) on images of "
            f"{image[2]} x {image[3]}, but two or more feature maps of different sizes were wanted; let it return maps of "
            "several stages."
        )
    return _checked_levels(used, maps, outputs)


def _checked_levels(
    levels: Sequence[int], maps: Mapping[int, Tensor], outputs: Sequence[Any]
) -> tuple[list[int], list[int]]:
    """`levels` and the channels there, if these maps shrink."""
    whole = isinstance(levels, list | tuple) and all(type(level) is int for level in levels)
    if not whole or len(levels) < 2 or len(set(levels)) < len(levels) or not set(levels) <= set(maps):
        raise ValueError(
            f"levels is {levels!r}, but a list of two or more of {list(maps)} was wanted, the positions of the feature maps "
            f"among what backbone returned ({describe_sizes(outputs)})."
        )
    sizes = [maps[level].shape[2:] for level in levels]
    for finer, coarser in itertools.pairwise(sizes):
        if coarser[0] > finer[0] or coarser[1] > finer[1]:
            raise ValueError(
                f"the feature maps of backbone at levels {list(levels)} are {describe_sizes([maps[level] for level in levels])}"
                ", but none may be larger than the one before; give maps (N, C, H, W), finest first."
            )
    return list(levels), [maps[level].shape[1] for level in levels]
