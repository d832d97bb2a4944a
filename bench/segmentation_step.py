"""The training step of FRSKD for segmentation: EfficientDetSeg-d0 on images of 256 x 256."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, originals
from bench.cases.self_teacher import half_precision
from bench.method_step import Step

if TYPE_CHECKING:
    from frskd_fast.tasks import FRSKDSegmentationTask

BATCH = 4
SIDE, TINY_SIDE = 256, 64
CLASSES = 21
CHANNELS_LAST = "auto channels_last"  # what the task does by default, beside the original's own layout


def block(layer: Any, x: Tensor) -> Tensor:
    """An MBConv block, one operation after the other."""
    inner = F.silu(layer._bn0(layer._expand_conv(x))) if layer.expands else x
    inner = F.silu(layer._bn1(layer._depthwise_conv(inner)))
    squeezed = F.silu(layer._se_reduce(F.adaptive_avg_pool2d(inner, 1)))
    inner = torch.sigmoid(layer._se_expand(squeezed)) * inner
    out: Tensor = layer._bn2(layer._project_conv(inner))
    return out + x if layer.residual else out


def layers(sequence: Any, x: Tensor) -> Tensor:
    """The layers of a sequence, whatever its class makes of them."""
    for layer in sequence:
        x = layer(x)
    return x


def enlarged(coarser: Tensor, finer: Tensor) -> Tensor:
    """Bilinear, to the size of `finer`."""
    return F.interpolate(coarser, finer.shape[2:], mode="bilinear", align_corners=False)


def pyramid(layer: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    """A bidirectional feature pyramid on P2 to P7, finest first; the last one has no way down."""
    up: list[Tensor] = []
    for level in range(len(maps) + 1, 1, -1):
        own = maps[level - 2]
        up.insert(0, layers(getattr(layer, f"conv{level}up"), own + enlarged(up[0], own) if up else own))
    if layer.is_last:
        return up
    out = [up[0]]
    for level in range(3, len(maps) + 2):
        finer = F.interpolate(out[-1], up[level - 2].shape[2:], mode="nearest")
        out.append(layers(getattr(layer, f"conv{level}dw"), maps[level - 2] + up[level - 2] + finer))
    return out


def features(network: Any, images: Tensor) -> list[Tensor]:
    """P2 to P7 of the student."""
    maps = [layers(network.layer0, images)]
    for group in (network.layer1, network.layer2, network.layer3, network.layer4, network.layer5):
        x = maps[-1]
        for layer in group:
            x = block(layer, x)
        maps.append(x)
    p6 = layers(network.conv6, maps[5])
    p7 = layers(network.conv7, p6)
    p5 = layers(network.toplayer, maps[5])
    p4 = layers(network.latlayer1, maps[3])
    p4 = enlarged(p5, p4) + p4
    p3 = layers(network.latlayer2, maps[2])
    p3 = enlarged(p4, p3) + p3
    p2 = layers(network.latlayer3, maps[1])
    p2 = enlarged(p3, p2) + p2
    found = [p2, p3, p4, p5, p6, p7]
    for layer in network.BiFPN1:
        found = pyramid(layer, found)
    return found


def original(images: Tensor, targets: Tensor, network: Any) -> Tensor:
    """FRSKD for segmentation as released: every layer keeps what it needs, and both maps are upsampled for their losses."""
    with half_precision(images):
        student = features(network, images)
        teacher = student
        for layer in network.BiFPN2:
            teacher = pyramid(layer, teacher)
        maps = layers(network.classifier1, student[0]), layers(network.classifier2, teacher[0])
        return originals.segmentation(*maps, targets) + originals.segmentation_attention(student, teacher)


def plain(images: Tensor, targets: Tensor, network: Any) -> Tensor:
    """The student alone."""
    with half_precision(images):
        maps = layers(network.classifier1, features(network, images)[0])
        return F.cross_entropy(
            F.interpolate(maps, targets.shape[1:], mode="bilinear", align_corners=False),
            targets, ignore_index=originals.IGNORED,
        )  # fmt: skip


def data(batch: int, small: bool) -> tuple[Tensor, Tensor]:
    """Images of noise and masks of patches, some of which are ignored."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    side = TINY_SIDE if small else SIDE
    images = torch.randn(batch, 3, side, side, generator=generator)
    patches = torch.randint(CLASSES + 1, (batch, 8, 8), generator=generator)
    targets = F.interpolate(patches[:, None].float(), (side, side), mode="nearest")[:, 0].long()
    return images, targets.masked_fill(targets == CLASSES, originals.IGNORED)


def networks(images: Tensor, small: bool) -> dict[str, nn.Module]:
    """A fresh network, without the two layers that the released code registers and never calls."""
    from frskd_fast.models import EfficientDetSeg

    network = EfficientDetSeg(0, CLASSES)
    network.smooth1 = network.smooth2 = nn.Sequential()
    return {"network": network}


def task(images: Tensor, channels_last: bool, network: nn.Module) -> FRSKDSegmentationTask:
    """Ours."""
    from frskd_fast.tasks import FRSKDSegmentationTask

    return FRSKDSegmentationTask(network, channels_last=channels_last)


STEP = Step(
    f"FRSKD segmentation {SIDE}x{SIDE}",
    BATCH,
    networks,
    ("network",),
    original,
    task,
    {"plain": plain},
    ("logit_maps", "attention"),
    data=data,
    more=(CHANNELS_LAST,),
)
