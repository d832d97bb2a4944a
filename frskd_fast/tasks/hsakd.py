"""HSAKD as modules: a teacher with auxiliary heads, its student, and a pair of peers (Yang et al., IJCAI 2021)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from frskd_fast.losses import HSAKDLoss, HSAKDOnlineLoss, HSAKDTeacherLoss
from frskd_fast.mixing import rotate4
from frskd_fast.models import AuxiliaryNetwork, with_auxiliary_heads
from frskd_fast.models.registry import created

from .base import Student, Task, features_and_logits, laid_out, logits_of, one_dtype
from .networks import (
    check_module,
    check_rotated,
    check_same_classes,
    frozen_teacher,
    in_order,
    upright,
    with_channels,
    with_shuffled_weights,
)
from .rotation_metrics import rotation_accuracies

NETWORKS = ("net1", "net2")


class HSAKDTeacherTask(Task):
    """loss = CE(upright) + sum_l CE(head l): a network, or its auxiliary heads alone, learn class and rotation of each view.

    What comes out is a teacher for `HSAKDTask`: `task.net`, the checkpoint, or the run's folder.

    Args:
        backbone: the network, `backbone(images) -> (features, logits)`; auxiliary heads are added by
            `frskd_fast.models.with_auxiliary_heads`. One that has them (`create_model("resnet32x4_aux")`) keeps them. It is
            used, not copied.
        freeze_backbone: train the heads alone, on a backbone that is already trained: it stays in evaluation mode and gets
            no gradient, so that its cross-entropy is a constant of the loss.
        evaluate_rotations: measure the heads in `evaluate`, which takes a pass over the four rotations of the images.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net: the `AuxiliaryNetwork`; checkpoints hold `net.backbone.*` and `net.auxiliary_classifier.*`.
        backbone: its backbone, the plain network.
        freeze_backbone, evaluate_rotations, channels_last: as given.

    Calling `task(images, targets=None)` with rotated images (4N, C, H, H), as `frskd_fast.mixing.rotate4` makes them, and
    targets as `HSAKDLoss` takes them returns in training mode a dict with `loss`, `output` (logits (N, K) of the upright
    images) and the terms `ce`, `auxiliary_ce_1`, ..., `auxiliary_ce_L` (scalars, detached). In evaluation mode, or without
    targets, images are plain and the dict is `{"output": logits}`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import resnet8
        >>> from frskd_fast.tasks import HSAKDTeacherTask
        >>> task = HSAKDTeacherTask(resnet8(num_classes=10), freeze_backbone=True)
        >>> parts = task(rotate4(torch.randn(2, 3, 16, 16)), torch.tensor([3, 1]))
        >>> list(parts)
        ['loss', 'output', 'ce', 'auxiliary_ce_1', 'auxiliary_ce_2', 'auxiliary_ce_3']
        >>> parts["loss"].backward()
        >>> task.backbone.training, task.backbone.fc.weight.grad
        (False, None)

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715); its HSAKD has a frozen backbone, its HSAKD* a trained one.
    """

    views = "rotations"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        freeze_backbone: bool = False,
        evaluate_rotations: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.net = _auxiliary_network(backbone)
        self.loss = HSAKDTeacherLoss()
        self.freeze_backbone = bool(freeze_backbone)
        self.evaluate_rotations = bool(evaluate_rotations)
        self.channels_last = bool(channels_last)
        if self.freeze_backbone:
            self.net.backbone.requires_grad_(False)
        self.train()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The network without its heads."""
        return self.net.backbone

    def train(self, mode: bool = True) -> Self:
        """As of every module, but for a frozen backbone, which stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.net.backbone.train(False)
        return self

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, images)}
        check_rotated(images, targets)
        logits, auxiliary = self.net(images, detach_features=self.freeze_backbone)
        logits, *auxiliary = one_dtype([logits, *auxiliary])
        parts = self.loss(logits, auxiliary, targets, return_parts=True)
        return {
            "loss": parts.loss,
            "output": upright(logits),
            "ce": parts.ce,
            **_numbered("auxiliary_ce", parts.auxiliary_ce),
        }

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`, and with `evaluate_rotations` what `rotation_accuracies` measures."""
        measured = super().evaluate(images, targets)
        return {**measured, **_rotation_accuracies(self, self.net, images, targets)}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"freeze_backbone={self.freeze_backbone}, channels_last={self.channels_last}"


class HSAKDTask(Task):
    """loss = CE(upright) + KD(logits) + sum_l KD(head l): a student learns each head of a frozen teacher, on all rotations.

    Args:
        backbone: the student, as for `HSAKDTeacherTask`. Its heads learn with it and are dropped by `student()`.
        teacher: a network with trained heads, as many as the student's: an `AuxiliaryNetwork`, or a file or a run's folder
            that holds one, see `frskd_fast.models.load_teacher`.
        temperature: T > 0 of KD.
        teacher_name: name of the teacher's network, with or without "_aux", where `teacher` is a file that does not say it.
        evaluate_rotations: measure the heads in `evaluate`, which takes a pass over the four rotations of the images.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net, backbone: as of `HSAKDTeacherTask`.
        teacher: the `FrozenTeacher`: in evaluation mode, without gradients, in `state_dict()` by path and checksum.
        evaluate_rotations, channels_last: as given.

    Calling it is as for `HSAKDTeacherTask`; the dict has `loss`, `output`, the terms `ce`, `kd`, `auxiliary_kd_1`, ...,
    `auxiliary_kd_L`, and `teacher_output`, the teacher's logits (N, K) of the upright images. Both networks see the same
    rotated images; the teacher keeps nothing for a backward pass, so there is no `memory` to choose.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import create_model, resnet8
        >>> from frskd_fast.tasks import HSAKDTask
        >>> task = HSAKDTask(resnet8(num_classes=10), create_model("resnet14_aux", 10))
        >>> parts = task(rotate4(torch.randn(2, 3, 16, 16)), torch.tensor([3, 1]))
        >>> list(parts)
        ['loss', 'output', 'ce', 'kd', 'auxiliary_kd_1', 'auxiliary_kd_2', 'auxiliary_kd_3', 'teacher_output']
        >>> parts["loss"].backward()
        >>> task.student().eval()(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 10])

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), as released.
    """

    views = "rotations"

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str,
        temperature: float = 3.0,
        *,
        teacher_name: str | None = None,
        evaluate_rotations: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.net = _auxiliary_network(backbone)
        self.teacher = frozen_teacher(teacher, teacher_name, self.net, "auxiliary")
        _check_same_heads(self.net, self.teacher.network, "teacher")
        self.loss = HSAKDLoss(temperature)
        self.evaluate_rotations = bool(evaluate_rotations)
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The student without its heads."""
        return self.net.backbone

    def forward(
        self, images: Tensor, targets: Any = None, teacher_outputs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the dict described above; `teacher_outputs` as in `Task.teacher_outputs`."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, images)}
        check_rotated(images, targets)
        if teacher_outputs is None:
            with torch.no_grad():
                teacher_outputs = self.teacher_outputs(images)
        logits, auxiliary = self.net(images, detach_features=False)
        teacher_heads = [teacher_outputs["logits"], *in_order(teacher_outputs, "auxiliary")]
        heads, count = one_dtype([logits, *auxiliary, *teacher_heads]), len(teacher_heads)
        (logits, *auxiliary), (teacher_logits, *teacher_auxiliary) = heads[:count], heads[count:]
        parts = self.loss(logits, teacher_logits, auxiliary, teacher_auxiliary, targets, return_parts=True)
        return {
            "loss": parts.loss,
            "output": upright(logits),
            "ce": parts.ce,
            "kd": parts.kd,
            **_numbered("auxiliary_kd", parts.auxiliary_kd),
            "teacher_output": upright(teacher_logits),
        }

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits and those of its heads; see `Task.teacher_outputs`."""
        logits, auxiliary = self.teacher(laid_out(images, self.channels_last))
        return {"logits": logits, **{f"auxiliary_{number}": head for number, head in enumerate(auxiliary, 1)}}

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`, and with `evaluate_rotations` what `rotation_accuracies` measures of the student."""
        measured = super().evaluate(images, targets)
        return {**measured, **_rotation_accuracies(self, self.net, images, targets)}

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of student and teacher."""
        maps = super().maps(images)
        teacher = self.teacher.network.get_submodule("backbone")
        return {**maps, "teacher": features_and_logits(teacher, laid_out(images, self.channels_last))[0]}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"channels_last={self.channels_last}"


class HSAKDOnlineTask(Task):
    """loss = sum over both nets of CE(upright) + sum_l CE(head l) + KD(logits) + sum_l KD(head l), KD from the other net.

    Two networks learn side by side, each with auxiliary heads, and either may be taken away.

    Args:
        backbone: the first network, `net1`, as for `HSAKDTeacherTask`.
        peer: the second, `net2`, with as many heads: a network, or the name of one for `create_model`; None takes a copy of
            the first, in which the values of each parameter are shuffled and the running statistics begin anew.
        temperature: T > 0 of KD.
        which: "net1" or "net2": the network that is `backbone`, whose logits are `output`, and that `student()` gives unless
            asked for the other.
        evaluate_rotations: measure the heads in `evaluate`, which takes a pass over the four rotations of the images.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net1, net2: the networks with their heads, each an `AuxiliaryNetwork`; checkpoints hold them under these names, as the
            original's do.
        backbone: that of `which`, without its heads.
        which, evaluate_rotations, channels_last: as given.

    Calling it is as for `HSAKDTeacherTask`; besides `loss` and `output` the dict has the other network's logits (N, K)
    under `net2_output` (`net1_output`), and of both networks the terms `net1_ce`, `net1_kd`, `net1_auxiliary_ce_1`, ...,
    `net1_auxiliary_kd_L`, `net2_ce` and so on. Evaluation measures both.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import resnet8
        >>> from frskd_fast.tasks import HSAKDOnlineTask
        >>> task = HSAKDOnlineTask(resnet8(num_classes=10), "resnet14")
        >>> parts = task(rotate4(torch.randn(2, 3, 16, 16)), torch.tensor([3, 1]))
        >>> list(parts)[:7]
        ['loss', 'output', 'net2_output', 'net1_ce', 'net1_kd', 'net1_auxiliary_ce_1', 'net1_auxiliary_ce_2']
        >>> parts["loss"].backward()
        >>> {name: student.backbone is task.backbone for name, student in task.students().items()}
        {'net1': True, 'net2': False}

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), as released; its result is that of the better network.
    """

    views = "rotations"

    def __init__(
        self,
        backbone: nn.Module,
        peer: str | nn.Module | None = None,
        temperature: float = 3.0,
        *,
        which: str = "net1",
        evaluate_rotations: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.which = _checked_which(which)
        self.net1 = _auxiliary_network(backbone)
        if peer is None:
            peer = with_shuffled_weights(backbone)
        elif isinstance(peer, str):
            peer = created(peer, self.net1.num_classes, {}, "peer")
        self.net2 = _auxiliary_network(peer, "peer")
        _check_same_heads(self.net1, self.net2, "peer")
        self.loss = HSAKDOnlineLoss(temperature)
        self.evaluate_rotations = bool(evaluate_rotations)
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The network that `which` names, without its heads."""
        return self.network(self.which).backbone

    def network(self, which: str) -> AuxiliaryNetwork:
        """The network called "net1" or "net2"."""
        found: AuxiliaryNetwork = getattr(self, _checked_which(which))
        return found

    @property
    def _other(self) -> str:
        return NETWORKS[1 - NETWORKS.index(self.which)]

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, images)}
        check_rotated(images, targets)
        outputs = [self.network(name)(images, detach_features=False) for name in NETWORKS]
        heads = one_dtype([head for logits, auxiliary in outputs for head in (logits, *auxiliary)])
        pair = heads[: 1 + self.net1.heads], heads[1 + self.net1.heads :]
        logits = [network[0] for network in pair]
        parts = self.loss(logits, [network[1:] for network in pair], targets, return_parts=True)
        outputs_of = {name: upright(network) for name, network in zip(NETWORKS, logits, strict=True)}
        terms: dict[str, Tensor] = {}
        for name, ce, kd, auxiliary_ce, auxiliary_kd in zip(
            NETWORKS, parts.ce, parts.kd, parts.auxiliary_ce, parts.auxiliary_kd, strict=True
        ):
            terms |= {f"{name}_ce": ce, f"{name}_kd": kd}
            terms |= _numbered(f"{name}_auxiliary_ce", auxiliary_ce) | _numbered(f"{name}_auxiliary_kd", auxiliary_kd)
        return {
            "loss": parts.loss,
            "output": outputs_of[self.which],
            f"{self._other}_output": outputs_of[self._other],
            **terms,
        }

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`, the other network's accuracy, and with `evaluate_rotations` what `rotation_accuracies` measures of both."""
        measured = super().evaluate(images, targets)
        other = logits_of(self.network(self._other).backbone, laid_out(images, self.channels_last))
        measured[f"{self._other}_accuracy"] = (other.argmax(1) == targets).float().mean()
        for name in NETWORKS:
            rotated = _rotation_accuracies(self, self.network(name), images, targets)
            measured |= {f"{name}_{metric}": value for metric, value in rotated.items()}
        return measured

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of both networks."""
        images = laid_out(images, self.channels_last)
        return {name: features_and_logits(self.network(name).backbone, images)[0] for name in NETWORKS}

    def student(self, which: str | None = None) -> Student:
        """One of the networks alone, as `Task.student`: "net1", "net2", or None for the one that the task was told."""
        return Student(self.network(which or self.which).backbone, self.channels_last)

    def students(self) -> dict[str, Student]:
        """Both networks alone; take the better one."""
        return {name: self.student(name) for name in NETWORKS}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"which={self.which!r}, channels_last={self.channels_last}"


def _auxiliary_network(backbone: Any, name: str = "backbone") -> AuxiliaryNetwork:
    """`backbone` with auxiliary heads, which it may have already."""
    check_module(backbone, name)
    return backbone if isinstance(backbone, AuxiliaryNetwork) else with_auxiliary_heads(with_channels(backbone))


def _check_same_heads(student: AuxiliaryNetwork, other: nn.Module, name: str) -> None:
    if not isinstance(other, AuxiliaryNetwork):
        raise TypeError(
            f"{name} is a {type(other).__name__} without auxiliary heads, but an AuxiliaryNetwork whose heads are trained was "
            "wanted; train them with HSAKDTeacherTask."
        )
    check_same_classes(student, other, name)
    if other.heads != student.heads:
        raise ValueError(
            f"{name} ({type(other.backbone).__name__}) has {other.heads} auxiliary heads, but backbone "
            f"({type(student.backbone).__name__}) has {student.heads} and the same number was wanted: they are compared in "
            "order."
        )


def _checked_which(which: str) -> str:
    if which not in NETWORKS:
        raise ValueError(f"which is {which!r}, but 'net1' or 'net2' was wanted.")
    return which


def _numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    """The entries of `values` (L,) as `name_1`, ..., `name_L`."""
    return {f"{name}_{number}": value for number, value in enumerate(values.unbind(), 1)}


def _rotation_accuracies(
    task: HSAKDTeacherTask | HSAKDTask | HSAKDOnlineTask, network: AuxiliaryNetwork, images: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    if not task.evaluate_rotations:
        return {}
    logits, auxiliary = network(rotate4(laid_out(images, task.channels_last)))
    return rotation_accuracies(logits, auxiliary, targets)
