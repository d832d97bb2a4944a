"""The training step of CollaborativeTeaching: WRN-16-1 beside a WRN-40-1 from scratch, under a trained one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, originals
from bench.cases.self_teacher import half_precision
from bench.method_step import Step

if TYPE_CHECKING:
    from frskd_fast.tasks import CollaborativeTeachingTask

BATCH = 128  # of the recipe
STUDENT, TEACHER, TINY = 16, 40, 10  # depths


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


def networks(images: Tensor, small: bool) -> dict[str, nn.Module]:
    """Two fresh networks and an expert with statistics, in evaluation mode."""
    from frskd_fast.models.cifar_wide_resnet import CIFARWideResNet

    depths = {"student": STUDENT, "scratch": TEACHER, "expert": TEACHER}
    built: dict[str, nn.Module] = {
        name: CIFARWideResNet(TINY if small else depth, 1, inputs.CLASSES) for name, depth in depths.items()
    }
    with torch.no_grad():
        built["expert"](images)
    built["expert"].eval().requires_grad_(False)
    return built


def task(
    images: Tensor, channels_last: bool, student: nn.Module, scratch: nn.Module, expert: nn.Module
) -> CollaborativeTeachingTask:
    """Ours."""
    from frskd_fast.tasks import CollaborativeTeachingTask

    return CollaborativeTeachingTask(student, scratch, expert, channels_last=channels_last)


STEP = Step(
    "CollaborativeTeaching",
    32,
    networks,
    ("student", "scratch"),
    original,
    task,
    {"plain": plain},
    ("logits", "attention"),
    cached=True,
)
