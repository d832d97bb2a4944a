"""Distillation from a frozen teacher into a student, by any loss of logits and feature maps: the ordinary case."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast.losses import FitNetLoss, FRSKDLoss, KDLoss, OverhaulLoss
from frskd_fast.losses.base import DistillationLoss, declared
from frskd_fast.ops import _checks, logits

from .base import Task, features_and_logits, laid_out, logits_of, one_dtype, traceable_targets
from .networks import (
    check_module,
    check_same_classes,
    check_same_levels,
    check_takes_preact,
    frozen_teacher,
    in_order,
    like,
    with_channels,
)


class _Distillation(NamedTuple):
    """The loss that goes by a name, and its weights."""

    loss: type[DistillationLoss] | type[KDLoss]
    gamma: float
    alpha: float
    beta: float | None


# RepDistiller's weights. It has no "od"; 1e-3 is that of the overhaul paper's CIFAR code.
DISTILL = {
    "kd": _Distillation(KDLoss, 0.1, 0.9, None),
    "att": _Distillation(FRSKDLoss, 1.0, 0.0, 1000.0),
    "fit": _Distillation(FitNetLoss, 1.0, 0.0, 100.0),
    "od": _Distillation(OverhaulLoss, 1.0, 0.0, 1e-3),
}


class DistillationTask(Task):
    """loss = gamma * CE(student) + alpha * KD + beta * D: a student, and a trained teacher that stays as it is.

    KD and D are those of `FRSKDLoss`, `FitNetLoss` or `OverhaulLoss`, for logits and feature maps of student and teacher. The
    teacher's cross-entropy, a constant here, is neither computed nor added.

    | `distill` | D | gamma | alpha | beta |
    | --- | --- | --- | --- | --- |
    | `"kd"` | none | 0.1 | 0.9 | |
    | `"att"` | attention transfer (`FRSKDLoss`) | 1 | 0 | 1000 |
    | `"fit"` | hints (`FitNetLoss`) | 1 | 0 | 100 |
    | `"od"` | overhaul distance (`OverhaulLoss`) | 1 | 0 | 1e-3 |

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`; for `"kd"` logits alone will do. It is used, not
            copied.
        teacher: the trained network: a module, a checkpoint file, the folder of a run, or "timm:NAME", see
            `frskd_fast.models.load_teacher`. A module is used, not copied.
        distill: the name of the loss, from the table; None is "kd".
        teacher_name: name of the teacher's network, as for `create_model`, where `teacher` is a file that does not say it.
        gamma, alpha, beta: the weights; None takes those of the table, which are RepDistiller's.
        temperature: T > 0 of KD; None is 4.
        label_smoothing, ignore_index: of the cross-entropy, as in `KDLoss`.
        loss: a custom loss instead of `distill` and its settings, called without targets as
            `loss(student_logits, teacher_logits, student_feats, teacher_feats, return_parts=True)`; gamma * CE(student) is
            added to it, with gamma 1 unless given. A loss with a false `needs_features`, such as `KDLoss`, is called as
            `loss(student_logits, teacher_logits, targets, return_parts=True)` and is the whole objective.
        resize: "pool" to average-pool the larger of two maps of different size; None makes them an error.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        backbone, teacher, loss: the modules. The teacher (a `FrozenTeacher`) stays in evaluation mode, reaches no optimiser,
            and is in `state_dict()` by path and checksum. Parameters of the loss, the adapters, are parameters of the task.
        gamma: weight of the cross-entropy that is added to the loss; None where the loss has one of its own.
        channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `FRSKDLoss` takes them returns in training
    mode a dict with `loss` (scalar, float32 or float64), `output` and `teacher_output` (logits (N, K)) and the terms
    `ce_student`, `kd` and, but for `"kd"`, `feature` (scalars before their weights, detached). In evaluation mode, or without
    targets, the dict is `{"output": logits}`. The teacher runs once a batch and keeps nothing for a backward pass, so there
    is no `memory` to choose.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import DistillationTask
        >>> task = DistillationTask(wrn16x2(num_classes=10), wrn16x2(num_classes=10), "att", alpha=0.9)
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)
        ['loss', 'output', 'ce_student', 'kd', 'feature', 'teacher_output']
        >>> parts["loss"].backward()
        >>> all(parameter.grad is None for parameter in task.teacher.parameters())
        True

    Source: Hinton et al., 2015 (arXiv 1503.02531); weights and their names as in RepDistiller (Tian et al., ICLR 2020).
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str,
        distill: str | None = None,
        *,
        teacher_name: str | None = None,
        gamma: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float | None = None,
        label_smoothing: float | None = None,
        ignore_index: int | None = None,
        loss: nn.Module | None = None,
        resize: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        if resize not in (None, "pool"):
            raise ValueError(f"resize is {resize!r}, but None or 'pool' was wanted.")
        settings = {
            "gamma": gamma,
            "alpha": alpha,
            "beta": beta,
            "temperature": temperature,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        self.backbone = backbone
        self.teacher = frozen_teacher(teacher, teacher_name, backbone)
        kind: Any = _chosen(distill, given) if loss is None else _checked(loss, distill, given)
        if declared(kind, "needs_features"):
            self.backbone, self.teacher.network = with_channels(backbone), with_channels(self.teacher.network)
            check_same_levels(self.backbone, self.teacher.network)
        check_same_classes(self.backbone, self.teacher.network)
        self.gamma: float | None = None
        if declared(kind, "needs_features"):
            self.gamma = _checks.finite_number(given.pop("gamma", 1.0), "gamma")
        if loss is None:
            channels: Any = getattr(self.backbone, "channels", ())
            loss = like(backbone, kind.for_networks(channels, self.teacher.network, **given))
        self.loss = loss
        if getattr(loss, "beta", None) == 0.0:
            # The feature term is not computed then, and DistributedDataParallel would wait for gradients of the adapters.
            loss.requires_grad_(False)
        if resize is not None:
            loss.resize = resize  # type: ignore[assignment]
        if self._preact:
            check_takes_preact(self.backbone, "backbone", loss)
            check_takes_preact(self.teacher.network, "teacher", loss)
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def may_be_zero(self) -> list[str]:  # type: ignore[override]
        """Terms that are not computed, because their weight is 0."""
        terms = {"feature": "beta"}
        if isinstance(self.loss, KDLoss):
            terms = {"ce_student": "gamma", "kd": "alpha"}
        return [term for term, weight in terms.items() if getattr(self.loss, weight, None) == 0.0]

    @property
    def _preact(self) -> bool:
        return bool(declared(self.loss, "needs_preact"))

    def forward(
        self, images: Tensor, targets: Any = None, teacher_outputs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the dict described above; `teacher_outputs` as in `Task.teacher_outputs`."""
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, laid_out(images, self.channels_last))}
        if teacher_outputs is None:
            with torch.no_grad():
                teacher_outputs = self.teacher_outputs(images)
        teacher_output, teacher_features = teacher_outputs["logits"], in_order(teacher_outputs, self._features)
        features, output = self._outputs(self.backbone, images, "backbone")
        smoothing, ignored = declared(self.loss, "label_smoothing"), declared(self.loss, "ignore_index")
        targets = traceable_targets(targets, output, ignored, smoothing)
        loss_logits = one_dtype([output, teacher_output])
        if self.gamma is None:
            parts = self.loss(*loss_logits, targets, return_parts=True)._asdict()
            loss = parts.pop("loss")
        else:
            maps = one_dtype([*features, *teacher_features])
            students, teachers = maps[: len(features)], maps[len(features) :]
            parts = self.loss(*loss_logits, students, teachers, return_parts=True)._asdict()
            ce, _, _ = logits.logit_losses(output, None, targets, 1.0, smoothing, ignored, "batchmean", True, "auto")
            loss = self.gamma * ce + parts.pop("loss")
            parts.pop("ce_teacher", None)
            parts["ce_student"] = ce.detach()
        return {"loss": loss, "output": output, **parts, "teacher_output": teacher_output}

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits and, where the loss compares them, its feature maps; see `Task.teacher_outputs`."""
        features, output = self._outputs(self.teacher, images, "teacher")
        return {"logits": output, **{f"{self._features}_{number}": maps for number, maps in enumerate(features, 1)}}

    @property
    def _features(self) -> str:
        return "preact_features" if self._preact else "features"

    def _outputs(self, network: nn.Module, images: Tensor, name: str) -> tuple[list[Tensor], Tensor]:
        """Feature maps, where the loss compares them, and logits."""
        images = laid_out(images, self.channels_last)
        if self.gamma is None:
            return [], logits_of(network, images, name)
        return features_and_logits(network, images, self._preact, name)

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of the student, and of a teacher that has some."""
        maps = super().maps(images)
        if hasattr(self.teacher.network, "channels"):
            maps["teacher"] = features_and_logits(self.teacher, laid_out(images, self.channels_last))[0]
        return maps

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"gamma={self.gamma}, channels_last={self.channels_last}"


def _chosen(distill: str | None, given: dict[str, Any]) -> Any:
    """The class of the loss; `given` gets the weights that it lacks."""
    distill = "kd" if distill is None else distill
    if distill not in DISTILL:
        raise ValueError(f"distill is {distill!r}, but {', '.join(map(repr, DISTILL))} or None was wanted.")
    chosen = DISTILL[distill]
    for name, value in (("gamma", chosen.gamma), ("alpha", chosen.alpha), ("beta", chosen.beta)):
        if value is not None:
            given.setdefault(name, value)
        elif name in given:
            raise ValueError(f"{name} is {given[name]}, but distill={distill!r} has no term for it; leave it out.")
    return chosen.loss


def _checked(loss: nn.Module, distill: str | None, given: dict[str, Any]) -> nn.Module:
    """`loss`, beside which no other is described, and which is one for images as they are."""
    check_module(loss, "loss")
    takes_gamma = declared(loss, "needs_features")
    for name, value in {"distill": distill, **given}.items():
        if value is not None and not (name == "gamma" and takes_gamma):
            raise ValueError(f"{name} is {value!r}, but loss came with settings of its own; leave one of them out.")
    if declared(loss, "passes") is not None:
        raise ValueError(
            f"loss ({type(loss).__name__}) wants the rotations of the images (passes={declared(loss, 'passes')!r}), which this "
            "task does not make; use the task of its method."
        )
    return loss
