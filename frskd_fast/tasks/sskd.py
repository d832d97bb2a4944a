"""SSKD's two stages as modules: a projection head for a trained teacher, and its student (Xu et al., ECCV 2020)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from frskd_fast.losses import SSKDHeadLoss, SSKDLoss
from frskd_fast.mixing import rotate4
from frskd_fast.models import ProjectionHead

from .base import Task, laid_out, logits_of, one_dtype
from .networks import check_module, check_rotated, check_same_classes, frozen_teacher, upright


class SSKDHeadTask(Task):
    """loss = CE(cos(rotated, upright), image): a projection head on a trained network, which stays as it is.

    What comes out is a teacher for `SSKDTask`: `task.net`, the checkpoint, or the run's folder.

    Args:
        backbone: the trained network, see `frskd_fast.models.ProjectionHead`, which is put around it; one that has a head keeps
            it. It is used, not copied.
        evaluate_rotations: measure the head in `evaluate`, which takes a pass over the four rotations of the images.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net: the `ProjectionHead`, whatever `train()` says in evaluation mode; of its parameters those of `proj_head` train.
            Checkpoints hold `net.backbone.*` and `net.proj_head.*`.
        backbone: its backbone.
        evaluate_rotations, channels_last: as given.

    Calling `task(images, targets=None)` with rotated images (4N, C, H, W), rows 4n + r as `frskd_fast.mixing.rotate4` makes
    them, and targets, whose values are not used, returns in training mode a dict with `loss`, `output` (logits (N, K) of the
    upright images) and `pretext_accuracy`, the share of the 3N rotated images whose largest cosine is that with their own
    upright image. In evaluation mode, or without targets, images are plain and the dict is `{"output": logits}`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import SSKDHeadTask
        >>> task = SSKDHeadTask(wrn16x2(num_classes=10))
        >>> parts = task(rotate4(torch.randn(2, 3, 16, 16)), torch.tensor([3, 1]))
        >>> list(parts)
        ['loss', 'output', 'pretext_accuracy']
        >>> parts["loss"].backward()
        >>> [name for name, parameter in task.named_parameters() if parameter.grad is not None]
        ['net.proj_head.0.weight', 'net.proj_head.0.bias', 'net.proj_head.2.weight', 'net.proj_head.2.bias']

    Source: Xu et al., ECCV 2020 (arXiv 2006.07114), as released.
    """

    views = "rotations"

    def __init__(self, backbone: nn.Module, *, evaluate_rotations: bool = True, channels_last: bool = True) -> None:
        super().__init__()
        self.net = _with_projection_head(backbone)
        self.net.backbone.requires_grad_(False)
        self.loss = SSKDHeadLoss()
        self.evaluate_rotations = bool(evaluate_rotations)
        self.channels_last = bool(channels_last)
        self.train()
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The network without the head."""
        return self.net.backbone

    def train(self, mode: bool = True) -> Self:
        """As of every module, but the network stays in evaluation mode."""
        super().train(mode)
        self.net.train(False)
        return self

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, images)}
        check_rotated(images, targets)
        logits, projections, _ = self.net(images, detach_features=True)
        parts = self.loss(projections, return_parts=True)
        return {"loss": parts.loss, "output": upright(logits), "pretext_accuracy": parts.accuracy}

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`, and with `evaluate_rotations` the `pretext_accuracy`, which falls with the size of the batch."""
        measured = super().evaluate(images, targets)
        if self.evaluate_rotations:
            _, projections, _ = self.net(rotate4(laid_out(images, self.channels_last)))
            measured["pretext_accuracy"] = self.loss(projections, return_parts=True).accuracy
        return measured

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"channels_last={self.channels_last}"


class SSKDTask(Task):
    """loss = ce_weight * CE + kd_weight * KD + transformed_weight * KD_rotated + similarity_weight * KD_similarity.

    A student of a frozen teacher that was given a projection head by `SSKDHeadTask`; the terms are those of `SSKDLoss`.

    Args:
        backbone: the student, as for `SSKDHeadTask`. Its head learns with it and is dropped by `student()`.
        teacher: a network with a trained projection head: a `ProjectionHead`, or a file or a run's folder that holds one, see
            `frskd_fast.models.load_teacher`.
        ce_weight, kd_weight, transformed_weight, similarity_weight: of the terms, as in `SSKDLoss`.
        kd_temperature, transformed_temperature, similarity_temperature: as in `SSKDLoss`.
        transformed_ratio, similarity_ratio: as in `SSKDLoss`.
        teacher_name: name of the teacher's network, as for `create_model`, where `teacher` is a file that does not say it.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        net, backbone: as of `SSKDHeadTask`, but all of it trains.
        teacher: the `FrozenTeacher`: in evaluation mode, without gradients, in `state_dict()` by path and checksum.
        loss: the `SSKDLoss`.
        channels_last: as given.

    Calling it is as for `SSKDHeadTask`, with class indices (N,) as targets; the dict has `loss`, `output`, the terms `ce`,
    `kd`, `transformed`, `similarity` (scalars before their weights, detached) and `teacher_output`, the teacher's logits
    (N, K) of the upright images. Both networks see the same images; the teacher keeps nothing for a backward pass, so
    there is no `memory` to choose.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import ProjectionHead, wrn16x2
        >>> from frskd_fast.tasks import SSKDTask
        >>> task = SSKDTask(wrn16x2(num_classes=10), ProjectionHead(wrn16x2(num_classes=10)))
        >>> parts = task(rotate4(torch.randn(2, 3, 16, 16)), torch.tensor([3, 1]))
        >>> list(parts)
        ['loss', 'output', 'ce', 'kd', 'transformed', 'similarity', 'teacher_output']
        >>> parts["loss"].backward()
        >>> task.student().eval()(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 10])

    Source: Xu et al., ECCV 2020 (arXiv 2006.07114), as released.
    """

    views = "rotations"

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str,
        *,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        transformed_weight: float = 2.7,
        similarity_weight: float = 10.0,
        kd_temperature: float = 4.0,
        transformed_temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        transformed_ratio: float = 1.0,
        similarity_ratio: float = 0.75,
        teacher_name: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.net = _with_projection_head(backbone)
        self.teacher = frozen_teacher(teacher, teacher_name, self.net, "projection")
        if not isinstance(self.teacher.network, ProjectionHead):
            raise TypeError(
                f"teacher is a {type(self.teacher.network).__name__} without a projection head, but a ProjectionHead that is "
                "trained was wanted; train it with SSKDHeadTask."
            )
        check_same_classes(self.net, self.teacher.network)
        self.loss = SSKDLoss(
            ce_weight,
            kd_weight,
            transformed_weight,
            similarity_weight,
            kd_temperature,
            transformed_temperature,
            similarity_temperature,
            transformed_ratio,
            similarity_ratio,
        )
        if self.loss.similarity_weight == 0.0:
            # Projections are not compared then, and DistributedDataParallel would wait for gradients of the head.
            self.net.proj_head.requires_grad_(False)
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The student without the head."""
        return self.net.backbone

    @property
    def may_be_zero(self) -> list[str]:  # type: ignore[override]
        """Terms of weight 0."""
        terms = ("ce", "kd", "transformed", "similarity")
        return [term for term in terms if getattr(self.loss, f"{term}_weight") == 0.0]

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
        logits, projections, _ = self.net(images)
        logits, teacher_logits, projections, teacher_projections = one_dtype(
            [logits, teacher_outputs["logits"], projections, teacher_outputs["projections"]]
        )
        parts = self.loss(
            logits, teacher_logits, projections, teacher_projections, targets, return_parts=True
        )._asdict()
        return {
            "loss": parts.pop("loss"),
            "output": upright(logits),
            **parts,
            "teacher_output": upright(teacher_logits),
        }

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits and projections; see `Task.teacher_outputs`."""
        logits, projections, _ = self.teacher(laid_out(images, self.channels_last))
        return {"logits": logits, "projections": projections}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"channels_last={self.channels_last}"


def _with_projection_head(backbone: nn.Module) -> ProjectionHead:
    """`backbone` with a projection head, which it may have already."""
    check_module(backbone, "backbone")
    return backbone if isinstance(backbone, ProjectionHead) else ProjectionHead(backbone)
