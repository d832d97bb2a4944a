"""A method added from outside: a loss, a network and a task on what the package offers, without a line changed in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast import functional
from frskd_fast.losses.base import Loss
from frskd_fast.models import create_model, register_model
from frskd_fast.tasks import FrozenTeacher, Task


@register_model
class ToyNet(nn.Module):
    """Two strided convolutions with BatchNorm, and a classifier of the pooled last map."""

    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.channels, self.num_classes = [width, 2 * width], num_classes
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        first = self.first(images)
        second = self.second(first)
        return [first, second], self.fc(second.mean((2, 3)))


class ToyLossParts(NamedTuple):
    """What ``ToyLoss(..., return_parts=True)`` returns."""

    loss: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    hint: Tensor


class ToyLoss(Loss[ToyLossParts]):
    """CE(student) + CE(teacher) + ramp * weight * mean (z_student - z_teacher)^2, the teacher detached in the last term."""

    shown = ("weight",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Any,
        *,
        ramp: Tensor | float = 1.0,
        return_parts: bool = False,
    ) -> Tensor | ToyLossParts:
        ce = functional.cross_entropy_kd(student_logits, teacher_logits, targets)
        hint = (student_logits - teacher_logits.detach()).square().mean()
        loss = ce.ce_student + ce.ce_teacher + ramp * self.weight * hint
        parts = ToyLossParts(loss, ce.ce_student.detach(), ce.ce_teacher.detach(), hint.detach())
        return parts if return_parts else loss


class ToyTask(Task):
    """A linear head on the first map teaches the student, or a frozen network does; the hint grows over the epochs.

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`.
        num_classes: K; None takes the backbone's.
        weight: of the hint.
        head_weight_decay: of the head, whatever the other parameters have.
        teacher: file with the state of a `ToyNet` that teaches instead of the head.
        channels_last: as for all tasks.
    """

    ramp: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int | None = None,
        weight: float = 1.0,
        head_weight_decay: float = 1e-5,
        teacher: str | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.channels_last = channels_last
        self.head_weight_decay = head_weight_decay
        self.loss = ToyLoss(weight)
        classes = num_classes or self.backbone.num_classes
        self.head = nn.Linear(self.backbone.channels[0], classes)
        self.teacher: FrozenTeacher | None = None
        if teacher is not None:
            network = create_model("ToyNet", classes)
            network.load_state_dict(torch.load(Path(teacher), weights_only=True))
            self.teacher = FrozenTeacher(network, teacher)
            self.head.requires_grad_(False)
        self.register_buffer("ramp", torch.zeros(()))

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        features, logits = self.backbone(images)
        if targets is None or not self.training:
            return {"output": logits}
        teacher_logits = self.head(features[0].mean((2, 3))) if self.teacher is None else self.teacher(images)[1]
        parts = self.loss(logits, teacher_logits, targets, ramp=self.ramp, return_parts=True)
        return {**parts._asdict(), "output": logits, "teacher_output": teacher_logits}

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        groups = [{"params": list(self.backbone.parameters())}]
        return groups + ([{"params": head, "weight_decay": self.head_weight_decay}] if head else [])

    def start_epoch(self, epoch: int, epochs: int | None) -> None:
        self.ramp.fill_((epoch + 1) / (epochs or epoch + 1))
