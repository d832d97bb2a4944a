"""A whole training step of CollaborativeTeaching, WRN-16-1 beside and under a WRN-40-1: in the original's order, and ours.

A step is the expert's forward pass, and forward, loss and backward of student and scratch teacher; the optimiser is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, originals
from bench.case import Case, Operands, Selection
from bench.cases.self_teacher import half_precision

BATCH = 128  # of the recipe
STEP_BATCH = 32
STUDENT, TEACHER, TINY = 16, 40, 10  # depths
PLAIN = ("plain",)
OURS = ("auto teacher cached", "auto compiled")


def original(images: Tensor, targets: Tensor, student: nn.Module, scratch: nn.Module, expert: nn.Module) -> Tensor:
    """CollaborativeTeaching in the original's order of operations; the student learns the expert's attention."""
    with half_precision(images):
        scratch_maps, scratch_logits = scratch(images)
        student_maps, student_logits = student(images)
        with torch.no_grad():
            expert_maps, _ = expert(images)
        return originals.collaborative(student_logits, scratch_logits, student_maps, scratch_maps, expert_maps, targets)


def plain(images: Tensor, targets: Tensor, student: nn.Module, scratch: nn.Module, expert: nn.Module) -> Tensor:
    """The student alone."""
    with half_precision(images):
        return F.cross_entropy(student(images)[1], targets)


def ours(layout: str, name: str) -> Callable[..., Tensor]:
    """The task, with every operation by the implementation that `name` begins with; also the student alone."""
    import frskd_fast
    from frskd_fast.tasks import CollaborativeTeachingTask

    if name in PLAIN:
        return plain
    implementation, *form = name.split()
    built: list[Any] = []

    def task_of(student: nn.Module, scratch: nn.Module, expert: nn.Module) -> Any:
        """The task of these networks, built once for as long as they come."""
        if not built or built[0] is not student:
            task = CollaborativeTeachingTask(student, scratch, expert, channels_last=layout == "channels_last")
            if "compiled" in form:
                task.compile()
            built[:] = [student, task, None]
        return built[1]

    def step(images: Tensor, targets: Tensor, student: nn.Module, scratch: nn.Module, expert: nn.Module) -> Tensor:
        with frskd_fast.use_impl(implementation), half_precision(images):
            task = task_of(student, scratch, expert)
            if "cached" in form and built[2] is None:
                with torch.no_grad():
                    built[2] = task.teacher_outputs(images)
            loss: Tensor = task(images, targets, built[2])["loss"]
            return loss

    return step


def operands(student: int, teacher: int, images: Tensor, targets: Tensor) -> Operands:
    """A batch, two fresh networks and an expert with statistics, in evaluation mode."""
    from frskd_fast.models.cifar_wide_resnet import CIFARWideResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        names = {"student": student, "scratch": teacher, "expert": teacher}
        networks = {name: CIFARWideResNet(depth, 1, inputs.CLASSES) for name, depth in names.items()}
    with torch.no_grad():
        networks["expert"](images)
    networks["expert"].eval().requires_grad_(False)
    return {"images": images, "targets": targets, **networks}


def digits(batch: int) -> Operands:
    """A batch of digit images."""
    images, targets, _ = inputs.digit_images(batch)
    return operands(STUDENT, TEACHER, images, targets)


def tiny() -> Operands:
    """Small networks on two small images of noise."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(inputs.SEED))
    return operands(TINY, TINY, noise, torch.arange(2))


def cases(selection: Selection) -> Iterator[Case]:
    """dtype x layout; what is compiled is measured where compiling was asked for."""
    batch = selection.batch or STEP_BATCH
    for dtype in selection.dtypes_of_networks():
        for layout in selection.layouts:
            yield Case(
                suite="methods",
                shape=f"CollaborativeTeaching step N={batch}",
                dtype=dtype,
                layout=layout,
                backward=True,
                bytes_moved=0,
                operands=partial(digits, batch),
                tiny=tiny,
                differentiated=("student", "scratch"),
                original=original,
                ours=partial(ours, layout),
                chain=True,
                compiles=selection.compiles_network(dtype, layout),
                operations=("logits", "attention"),
                more=(*PLAIN, *OURS),
                images=batch,
            )
