"""A whole training step on cifarresnet18: plain cross-entropy, FRSKD in the original's order of operations, and ours.

A step is forward, loss and backward, up to the gradients of every parameter. The optimiser is left out: it is the same
for every row, and the self-teacher's parameters cost it the same in the original and in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs
from bench.case import Case, Operands, Selection
from bench.cases import loss as objective
from bench.cases import self_teacher as self_teacher_case
from bench.cases.self_teacher import half_precision

ORDER = 3
BATCH = 32
PLAIN = ("plain", "plain compiled")
OURS = ("auto memory=low", "auto compiled")


def plain(images: Tensor, targets: Tensor, backbone: nn.Module, self_teacher: nn.Module) -> Tensor:
    """Training without distillation."""
    with half_precision(images):
        return F.cross_entropy(backbone(images)[1], targets)


def original(images: Tensor, targets: Tensor, backbone: nn.Module, self_teacher: nn.Module) -> Tensor:
    """FRSKD in the original's order of operations."""
    with half_precision(images):
        features, logits = backbone(images)
        refined, teacher_logits = self_teacher_case.original(self_teacher, features)
        return objective.original(logits, teacher_logits, features, [level.detach() for level in refined], targets)


def ours(layout: str, name: str) -> Callable[..., Tensor]:
    """The task, with every operation by the implementation that `name` begins with; also the rows without distillation."""
    import frskd_fast
    from frskd_fast.tasks import FRSKDTask

    if name in PLAIN:
        return plain if name == "plain" else torch.compile(plain, dynamic=False)
    implementation, *form = name.split()
    built: list[Any] = []

    def task_of(backbone: nn.Module, self_teacher: nn.Module) -> Any:
        """The task of these networks, built once for as long as they come."""
        if not built or built[0].backbone is not backbone:
            memory = "low" if "memory=low" in form else "normal"
            task = FRSKDTask(backbone, self_teacher, memory=memory, channels_last=layout == "channels_last")
            if "compiled" in form:
                task.compile()
            built[:] = [task]
        return built[0]

    def step(images: Tensor, targets: Tensor, backbone: nn.Module, self_teacher: nn.Module) -> Tensor:
        with frskd_fast.use_impl(implementation), half_precision(images):
            loss: Tensor = task_of(backbone, self_teacher)(images, targets)["loss"]
            return loss

    return step


def operands(images: Tensor, targets: Tensor, backbone: nn.Module | None = None) -> Operands:
    """A batch and fresh networks; another backbone with `.channels` makes a smaller problem for tests."""
    from frskd_fast.models import cifarresnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        backbone = cifarresnet18(num_classes=inputs.CLASSES) if backbone is None else backbone
    channels: Any = backbone.channels
    self_teacher = self_teacher_case.seeded(channels, inputs.CLASSES)
    return {"images": images, "targets": targets, "backbone": backbone, "self_teacher": self_teacher}


def digits(batch: int, backbone: nn.Module | None = None) -> Operands:
    """A batch of digit images."""
    images, targets, _ = inputs.digit_images(batch)
    return operands(images, targets, backbone)


def tiny(backbone: nn.Module | None = None) -> Operands:
    """Two small images of noise."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(inputs.SEED))
    return operands(noise, torch.arange(2), backbone)


def cases(selection: Selection) -> list[Case]:
    """dtype x layout; what is compiled besides the original is measured where compiling was asked for."""
    batch = selection.batch or BATCH
    return [
        Case(
            suite="step",
            shape=f"N={batch}",
            dtype=dtype,
            layout=layout,
            backward=True,
            bytes_moved=0,
            operands=partial(digits, batch),
            tiny=tiny,
            differentiated=("backbone", "self_teacher"),
            original=original,
            ours=partial(ours, layout),
            chain=True,
            compiles=selection.compiles_network(dtype, layout),
            operations=("attention", "logits", "combine", "fusion"),
            more=(*PLAIN, *OURS) if selection.full else (*PLAIN[:1], *OURS),
            images=batch,
        )
        for dtype in selection.dtypes_of_networks()
        for layout in selection.layouts
    ]
