"""AdaIN-KD in the suite `methods`: moments and transfer by themselves, and the training step, resnet32x4 -> resnet8x4.

The step has the teacher's forward, and its tails behind each of the three stages. There is no published code of the method:
the baselines write mean, variance and transfer as style transfer does, for each term anew, and the tails by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, method_step
from bench.case import FLOAT_BYTES, Case, Operands, Selection
from bench.cases.self_teacher import half_precision
from bench.method_step import Step, with_statistics

if TYPE_CHECKING:
    from frskd_fast.tasks import AdaINTask

SHAPES = ((64, 256, 8, 8), (64, 512, 16, 16))
# Style and content are read twice, the upstream gradient once; the result and one gradient are written.
TENSORS_MOVED = 7
TEACHER, STUDENT, TINY = "resnet32x4", "resnet8x4", "resnet8"
EPSILON = 1e-5


def statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (N, C, 1, 1)."""
    shape = (*feature.shape[:2], 1, 1)
    pixels = feature.reshape(*feature.shape[:2], -1)
    return pixels.mean(dim=2).view(shape), (pixels.var(dim=2) + EPSILON).sqrt().view(shape)


def transferred(style: Tensor, content: Tensor) -> Tensor:
    """`content` with the statistics of `style`."""
    (mean, std), (own_mean, own_std) = statistics(style), statistics(content)
    normalised = (content - own_mean.expand(content.shape)) / own_std.expand(content.shape)
    return normalised * std.expand(content.shape) + mean.expand(content.shape)


def our_transfer(implementation: str) -> Callable[..., Tensor]:
    """The public functions, forced to one implementation."""
    from frskd_fast import functional

    def transfer(style: Tensor, content: Tensor) -> Tensor:
        moments = functional.channel_moments(style, impl=implementation)
        return functional.adain(content, *moments, impl=implementation)

    return transfer


def maps(shape: Sequence[int]) -> Operands:
    """Two maps as they are after a ReLU."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    return {name: torch.randn(*shape, generator=generator).relu_() for name in ("style", "content")}


def transfer_cases(selection: Selection) -> Iterator[Case]:
    """Shape x dtype x layout, forward and backward."""
    for _, *map_shape in SHAPES:
        batch = selection.batch or SHAPES[0][0]
        shape = (batch, *map_shape)
        for dtype in selection.dtypes:
            for layout in selection.layouts:
                yield Case(
                    suite="methods",
                    shape=f"AdaIN {shape}",
                    dtype=dtype,
                    layout=layout,
                    backward=True,
                    bytes_moved=TENSORS_MOVED * FLOAT_BYTES[dtype] * torch.Size(shape).numel(),
                    operands=partial(maps, shape),
                    tiny=partial(maps, (2, 3, 4, 4)),
                    differentiated=("style",),
                    original=transferred,
                    ours=our_transfer,
                    operations=("moments",),
                )


def tail(teacher: Any, stage: int, feature: Tensor) -> Tensor:
    """What a CIFAR ResNet does with one of its three maps."""
    for layer in (teacher.layer2, teacher.layer3)[stage:]:
        feature = F.relu(layer(feature))
    logits: Tensor = teacher.fc(feature.mean((2, 3)))
    return logits


def original(
    images: Tensor, targets: Tensor, student: nn.Module, connectors: nn.ModuleList, teacher: nn.Module
) -> Tensor:
    """AdaIN-KD, every term by its formula."""
    with half_precision(images):
        features, logits = student(images)
        with torch.no_grad():
            teacher_features, teacher_logits = teacher(images)
        loss = F.cross_entropy(logits, targets)
        for stage, (connect, feature, content) in enumerate(zip(connectors, features, teacher_features, strict=True)):
            style = connect(feature)
            for one, other in zip(statistics(style), statistics(content), strict=True):
                loss = loss + F.mse_loss(one, other)
            loss = loss + F.mse_loss(tail(teacher, stage, transferred(style, content)), teacher_logits)
        return loss


def plain(images: Tensor, targets: Tensor, student: nn.Module, connectors: nn.ModuleList, teacher: nn.Module) -> Tensor:
    """The student by itself."""
    with half_precision(images):
        return F.cross_entropy(student(images)[1], targets)


def networks(images: Tensor, small: bool) -> dict[str, nn.Module]:
    """A fresh student with connectors, and a teacher that does not learn."""
    from frskd_fast import models
    from frskd_fast.tasks.adain import connector

    names = (TINY, TINY) if small else (STUDENT, TEACHER)
    student, teacher = (models.create_model(name, inputs.CLASSES) for name in names)
    widths: Any = student.channels, teacher.channels
    connectors = nn.ModuleList(connector(*pair) for pair in zip(*widths, strict=True))
    frozen = with_statistics(teacher, images).requires_grad_(False)
    return {"student": student, "connectors": connectors, "teacher": frozen}


def task(
    images: Tensor, channels_last: bool, student: nn.Module, connectors: nn.ModuleList, teacher: nn.Module
) -> AdaINTask:
    """Ours, with these connectors."""
    from frskd_fast.tasks import AdaINTask

    built = AdaINTask(student, teacher, image_shape=images.shape[1:], channels_last=channels_last)
    built.connectors = connectors
    return built


STEP = Step("AdaIN", 64, networks, ("student", "connectors"), original, task, {"plain": plain}, ("moments", "logits"))


def cases(selection: Selection) -> list[Case]:
    """Moments and transfer, then the step."""
    return [*transfer_cases(selection), *method_step.cases(STEP, selection)]
