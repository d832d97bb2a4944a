"""The self-teacher BiFPNc from the features of cifarresnet18 to its cross-entropy, forward and backward.

The gradients are those of the features and of every parameter. What FRSKD distils, maps and logits, is detached there,
so the cross-entropy is all that reaches the self-teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, traffic
from bench.case import FLOAT_BYTES, Case, Operands, Selection
from bench.cases.fusion import weighted

ORDER = 2
BATCH = 32
TINY_PYRAMID = ((4, 8), (8, 4), (16, 2), (32, 1))


def original(self_teacher: Any, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """BiFPNc in the original's order of operations, on the parameters of `self_teacher`: (refined maps, logits).

    Every use of a map rectifies it anew, up-sampling comes before its convolution, and weights, products and sums are
    operations by themselves.
    """
    (layer,) = self_teacher.layers
    last = len(features) - 1
    lateral = [block.conv(F.relu(feature)) for block, feature in zip(layer.lat_conv, features, strict=True)]
    lateral2 = [block.conv(F.relu(feature)) for block, feature in zip(layer.lat_conv2, features[1:], strict=True)]

    up = [lateral[last]]
    for level in range(last - 1, -1, -1):
        coarser = F.interpolate(F.relu(up[0]), scale_factor=2, mode="nearest")
        coarser = layer.up_sample[level][1].conv(coarser)
        node = weighted([F.relu(lateral[level]), coarser], layer.up_weight[level])
        up.insert(0, layer.up_conv[level].conv(node))

    outputs = [up[0]]
    for level in range(1, last + 1):
        finer = F.max_pool2d(F.pad(F.relu(outputs[-1]), (0, 1, 0, 1)), 3, stride=2)
        finer = layer.down_sample[level - 1][1].conv(finer)
        own = [F.relu(lateral2[level - 1])] + ([F.relu(up[level])] if level < last else [])
        node = weighted([*own, finer], layer.down_weight[level - 1])
        outputs.append(layer.down_conv[level - 1].conv(node))

    logits = self_teacher.fc(F.adaptive_avg_pool2d(F.relu(outputs[-1]), 1).flatten(1))
    return [F.relu(output) for output in outputs], logits


def fast(self_teacher: Any, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The same by the module's own forward."""
    refined, logits = self_teacher(features)
    return refined, logits


def half_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the dtype of a half-precision map; nothing for others."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(tensor.device.type, tensor.dtype if half else torch.bfloat16, enabled=half)


def original_loss(features: Sequence[Tensor], self_teacher: nn.Module, targets: Tensor) -> Tensor:
    """CE(logits, targets) of the original's order of operations."""
    with half_precision(features[0]):
        _, logits = original(self_teacher, features)
        return F.cross_entropy(logits, targets)


def ours(implementation: str) -> Callable[..., Tensor]:
    """CE(logits, targets) of the module's own forward, with every operation forced to one implementation."""
    import frskd_fast

    def fast_loss(features: Sequence[Tensor], self_teacher: nn.Module, targets: Tensor) -> Tensor:
        with frskd_fast.use_impl(implementation), half_precision(features[0]):
            _, logits = fast(self_teacher, features)
            return F.cross_entropy(logits, targets)

    return fast_loss


def seeded(channels: Sequence[int], classes: int) -> nn.Module:
    """A fresh BiFPNc whose fusion weights differ, so that mixing them up would show."""
    from frskd_fast.models import BiFPNc

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        self_teacher = BiFPNc(list(channels), num_classes=classes, width=inputs.TEACHER_WIDTH)
        for name, parameter in self_teacher.named_parameters():
            if "_weight." in name:
                parameter.data = 0.5 + torch.rand(parameter.shape)
    return self_teacher


def operands(batch: int, kind: str) -> Operands:
    """The student's features, float32 NCHW, a fresh self-teacher, and labels."""
    given = inputs.distillation_inputs(batch, kind)
    return {
        "features": given.student_features,
        "self_teacher": seeded([channels for channels, _ in inputs.PYRAMID], inputs.CLASSES),
        "targets": given.targets,
    }


def tiny() -> Operands:
    """The same call on a few numbers."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    features = [torch.randn(2, channels, side, side, generator=generator) for channels, side in TINY_PYRAMID]
    self_teacher = seeded([channels for channels, _ in TINY_PYRAMID], 10)
    return {"features": features, "self_teacher": self_teacher, "targets": torch.arange(2)}


def cases(selection: Selection) -> list[Case]:
    """dtype x layout, forward and backward; the bytes are those of our order of operations."""
    batch = selection.batch or BATCH
    return [
        Case(
            suite="self_teacher",
            shape=f"N={batch} K={inputs.CLASSES}",
            dtype=dtype,
            layout=layout,
            backward=True,
            bytes_moved=traffic.total(traffic.ours(batch)).bytes(FLOAT_BYTES[dtype]),
            operands=partial(operands, batch, selection.input_kind),
            tiny=tiny,
            differentiated=("features", "self_teacher"),
            original=original_loss,
            ours=ours,
            chain=True,
            compiles=selection.compiles_network(dtype, layout),
            operations=("fusion",),
        )
        for dtype in selection.dtypes_of_networks()
        for layout in selection.layouts
    ]
