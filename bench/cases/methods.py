"""The methods: each loss by itself, and a whole training step (bench/method_step.py).

The networks of HSAKD and SSKD, resnet32x4 -> resnet8x4, see the four rotations of each image. What the steps of other methods
are made of is in bench/ffl_step.py, bench/collaborative_step.py, bench/segmentation_step.py and bench/adain_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import adain_rows, collaborative_step, ffl_step, inputs, method_step, originals, segmentation_step
from bench.call import tensors_in
from bench.case import FLOAT_BYTES, Case, Operands, Selection
from bench.cases.self_teacher import half_precision
from bench.method_step import Step, with_statistics

ORDER = 4
BATCH = 64  # images of the recipes; 256 rows
TEACHER, STUDENT = "resnet32x4", "resnet8x4"
TINY = "resnet8"
HEADS = 3
WRN_MAPS = ((16, 32), (32, 16), (64, 8))  # channels and side
PROJECTIONS = (128, 2048)  # of WRN-x-2, and of ResNet50


def peaked(rows: int, classes: int, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher: correlated, the label's is higher, the teacher's more so."""
    shared = torch.randn(rows, classes, generator=generator)
    label = torch.zeros(rows, classes).scatter_(1, labels.unsqueeze(1), 1.0)
    student, teacher = (shared + 0.5 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return student + 2.0 * label, teacher + 6.0 * label


class Size(NamedTuple):
    """Of one case's operands."""

    batch: int
    classes: int = inputs.CLASSES
    heads: int = HEADS
    width: int = PROJECTIONS[0]


def logits_of_pair(size: Size) -> Operands:
    """Logits of two networks for the rotated images, main and auxiliary ones, and labels."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    targets = torch.randint(size.classes, (size.batch,), generator=generator)
    joint = originals.joint_labels(targets)
    first, second = peaked(len(joint), size.classes, joint // originals.VIEWS, generator)
    heads = [peaked(len(joint), originals.VIEWS * size.classes, joint, generator) for _ in range(size.heads)]
    return {
        "student_logits": first,
        "teacher_logits": second,
        "student_auxiliary": [student for student, _ in heads],
        "teacher_auxiliary": [teacher for _, teacher in heads],
        "targets": targets,
    }


def teacher_operands(size: Size) -> Operands:
    """Of the teacher's loss."""
    pair = logits_of_pair(size)
    return {"logits": pair["teacher_logits"], "auxiliary": pair["teacher_auxiliary"], "targets": pair["targets"]}


def online_operands(size: Size) -> Operands:
    """Of two networks that teach each other."""
    pair = logits_of_pair(size)
    return {
        "logits": [pair["student_logits"], pair["teacher_logits"]],
        "first_auxiliary": pair["student_auxiliary"],
        "second_auxiliary": pair["teacher_auxiliary"],
        "targets": pair["targets"],
    }


def projections(size: Size, noise: float) -> Tensor:
    """Projections (4B, D) in which the views of one image resemble each other, the less so the more noise there is."""
    generator = torch.Generator().manual_seed(inputs.SEED + 1)
    images = torch.randn(size.batch, size.width, generator=generator).repeat_interleave(originals.VIEWS, 0)
    return images + noise * torch.randn(images.shape, generator=generator)


def sskd_operands(size: Size) -> Operands:
    """Of the student's loss."""
    pair = logits_of_pair(size._replace(heads=0))
    return {
        "student_logits": pair["student_logits"],
        "teacher_logits": pair["teacher_logits"],
        "student_projections": projections(size, 4.0),
        "teacher_projections": projections(size, 3.0),
        "targets": pair["targets"],
    }


def head_operands(size: Size) -> Operands:
    """Of the projection head's loss."""
    return {"projections": projections(size, 3.0)}


def ffl_operands(size: Size) -> Operands:
    """Logits of two networks and of their fused classifier, (B, K)."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    targets = torch.randint(size.classes, (size.batch,), generator=generator)
    first, fused = peaked(size.batch, size.classes, targets, generator)
    second = first + 0.5 * torch.randn(first.shape, generator=generator)
    return {"logits": [first, second], "fused_logits": fused, "targets": targets}


def collaborative_operands(size: Size) -> Operands:
    """Logits of student and scratch teacher, and the maps of WRN-16-1 and WRN-40-1 for images of 32 x 32."""
    generator = torch.Generator().manual_seed(inputs.SEED)
    targets = torch.randint(size.classes, (size.batch,), generator=generator)
    student, scratch = peaked(size.batch, size.classes, targets, generator)
    shapes = [(size.batch, channels, side, side) for channels, side in WRN_MAPS]
    maps = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    return {
        "student_logits": student,
        "scratch_logits": scratch,
        "student_feats": maps[0],
        "scratch_feats": [],  # not read where the student learns the attention
        "expert_feats": maps[1],
        "targets": targets,
    }


class Objective(NamedTuple):
    """One loss: how it is called by the original and by the library."""

    name: str
    operands: Callable[[Size], Operands]
    differentiated: tuple[str, ...]
    original: Callable[..., Tensor]
    loss: str  # its class in frskd_fast.losses
    operations: tuple[str, ...]
    size: Size = Size(BATCH)


OBJECTIVES = (
    Objective(
        "HSAKD",
        logits_of_pair,
        ("student_logits", "student_auxiliary"),
        originals.hsakd,
        "HSAKDLoss",
        ("logits",),
    ),
    Objective(
        "HSAKD teacher",
        teacher_operands,
        ("logits", "auxiliary"),
        originals.hsakd_teacher,
        "HSAKDTeacherLoss",
        ("logits",),
    ),
    Objective(
        "HSAKD online",
        online_operands,
        ("logits", "first_auxiliary", "second_auxiliary"),
        originals.hsakd_online,
        "HSAKDOnlineLoss",
        ("logits",),
    ),
    *(
        Objective(
            f"SSKD D={width}",
            sskd_operands,
            ("student_logits", "student_projections"),
            originals.sskd,
            "SSKDLoss",
            ("logits",),
            Size(BATCH, width=width),
        )
        for width in PROJECTIONS
    ),
    Objective("SSKD head", head_operands, ("projections",), originals.sskd_head, "SSKDHeadLoss", ("logits",)),
    Objective(
        "FFL",
        ffl_operands,
        ("logits", "fused_logits"),
        originals.ffl,
        "FFLLoss",
        ("mutual_logits",),
        Size(ffl_step.BATCH),
    ),
    Objective(
        "CollaborativeTeaching",
        collaborative_operands,
        ("student_logits", "scratch_logits", "student_feats"),
        originals.collaborative,
        "CollaborativeTeachingLoss",
        ("logits", "attention"),
        Size(collaborative_step.BATCH),
    ),
)


def ours(name: str, implementation: str) -> Callable[..., Tensor]:
    """The public loss module, forced to one implementation."""
    from frskd_fast import losses

    criterion = getattr(losses, name)(impl=implementation)

    def loss(**operands: Any) -> Tensor:
        arguments = list(operands.values())
        if "first_auxiliary" in operands:
            logits, first, second, targets = arguments
            arguments = [logits, [first, second], targets]
        result: Tensor = criterion(*arguments)
        return result

    return loss


def bytes_moved(operands: Operands, differentiated: tuple[str, ...], dtype: str) -> int:
    """Every operand is read and every gradient is written, once."""

    def moved(tensor: Tensor, times: int) -> int:
        size = FLOAT_BYTES[dtype] if tensor.is_floating_point() else tensor.element_size()
        return times * size * tensor.numel()

    return sum(
        moved(tensor, 2 if name in differentiated else 1)
        for name, value in operands.items()
        for tensor in tensors_in(value)
    )


def loss_cases(selection: Selection) -> Iterator[Case]:
    """Objective x dtype, forward and backward."""
    for objective in OBJECTIVES:
        size = objective.size._replace(batch=selection.batch or objective.size.batch)
        operands = objective.operands(size)
        for dtype in selection.dtypes:
            yield Case(
                suite="methods",
                shape=f"{objective.name} N={size.batch}",
                dtype=dtype,
                layout="rows",
                backward=True,
                bytes_moved=bytes_moved(operands, objective.differentiated, dtype),
                operands=partial(objective.operands, size),
                tiny=partial(objective.operands, Size(2, 10, width=8)),
                differentiated=objective.differentiated,
                original=objective.original,
                ours=partial(ours, objective.loss),
                operations=objective.operations,
            )


def hsakd_step(images: Tensor, targets: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """HSAKD in the original's order of operations."""
    with half_precision(images):
        views = originals.rotated(images)
        logits, auxiliary = student(views)
        with torch.no_grad():
            teacher_logits, teacher_auxiliary = teacher(views)
        return originals.hsakd(logits, teacher_logits, auxiliary, teacher_auxiliary, targets)


def sskd_step(images: Tensor, targets: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """SSKD in the original's order of operations, with the rotations that its loader makes."""
    with half_precision(images):
        views = originals.rotated(images)
        logits, projections, _ = student(views)
        with torch.no_grad():
            teacher_logits, teacher_projections, _ = teacher(views)
        return originals.sskd(logits, teacher_logits, projections, teacher_projections, targets)


def plain(images: Tensor, targets: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The student alone on the same images, without heads and without a teacher."""
    with half_precision(images):
        _, logits = student.get_submodule("backbone")(originals.rotated(images))
        return F.cross_entropy(logits, targets.repeat_interleave(originals.VIEWS))


def plain_with_heads(images: Tensor, targets: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The student with what the method adds to it, and without a teacher."""
    with half_precision(images):
        logits, heads, *_ = student(originals.rotated(images))
        if isinstance(heads, Tensor):
            return F.cross_entropy(logits[:: originals.VIEWS], targets) + originals.sskd_head(heads)
        return originals.hsakd_teacher(logits, heads, targets)


def pair(wrapper: str, images: Tensor, small: bool) -> dict[str, nn.Module]:
    """A fresh student and a teacher that does not learn, each within `wrapper`, a name of frskd_fast.models."""
    from frskd_fast import models

    names = (TINY, TINY) if small else (STUDENT, TEACHER)
    student, teacher = (getattr(models, wrapper)(models.create_model(name, inputs.CLASSES)) for name in names)
    return {"student": student, "teacher": with_statistics(teacher, images)}


def task(name: str, images: Tensor, channels_last: bool, student: nn.Module, teacher: nn.Module) -> Any:
    """Ours, a name of frskd_fast.tasks."""
    from frskd_fast import tasks

    return getattr(tasks, name)(student, teacher=teacher, channels_last=channels_last)


def taught(name: str, wrapper: str, original: Callable[..., Tensor], task_name: str) -> Step:
    """The step of a method with a frozen teacher of rotated images."""
    rows = {"plain": plain, "plain with heads": plain_with_heads}
    networks = partial(pair, wrapper)
    return Step(name, 16, networks, ("student",), original, partial(task, task_name), rows, ("logits",), cached=True)


STEPS = (
    taught("HSAKD", "with_auxiliary_heads", hsakd_step, "HSAKDTask"),
    taught("SSKD", "ProjectionHead", sskd_step, "SSKDTask"),
    ffl_step.STEP,
    collaborative_step.STEP,
    segmentation_step.STEP,
)


def cases(selection: Selection) -> list[Case]:
    """The losses, then the steps."""
    steps = (case for step in STEPS for case in method_step.cases(step, selection))
    return [*loss_cases(selection), *steps, *adain_rows.cases(selection)]
