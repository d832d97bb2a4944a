"""AdaIN-KD in one module: a student, connectors, a teacher that goes on with the student's statistics (arXiv 2003.04289)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.losses import AdaINLoss
from frskd_fast.models.tails import tails as tails_of
from frskd_fast.ops.moments import adain

from .base import Task, features_and_logits, laid_out, logits_of, one_dtype, traceable_targets
from .networks import check_module, check_same_classes, check_same_levels, frozen_teacher, like, with_channels

# So many of the last stages are taken where none are named.
LAST_STAGES = 3


class AdaINTask(Task):
    """loss = CE + statistics_weight * sum_l (D(m_l) + D(s_l)) + transfer_weight * sum_l J(z_l): a student of a frozen teacher.

    m_l and s_l are the channel statistics of c_l, the student's feature map of stage l brought to the teacher's channels by a
    connector (1x1 convolution without bias, BatchNorm, ReLU). z_l are the logits of the teacher when it goes on from stage l
    with them in its own map: tail_l(adain(teacher's map, m_l, s_l)). D and J are those of `AdaINLoss`.

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`. It is used, not copied.
        teacher: the trained network with as many feature maps, of any sizes and channels: a module, a checkpoint file, the
            folder of a run, or "timm:NAME", see `frskd_fast.models.load_teacher`. A module is used, not copied.
        stages: positions of the feature maps, finest first, from 0; None takes the last three.
        statistics_weight, transfer_weight: as in `AdaINLoss`; not both 0. Without transfer the teacher needs no tails.
        judge: "mse", "kl" or "ce", see `AdaINLoss`.
        temperature: T > 0 of "kl".
        unbiased, eps: of the statistics, see `frskd_fast.functional.channel_moments`.
        tails: what the teacher does with its map of each stage, functions or modules from (N, C, H, W) to (N, K) that are made
            of the teacher's own modules; None finds them, see `frskd_fast.models.tail`.
        image_shape: (C, H, W) of the images, for a teacher whose tails depend on it (VGG).
        teacher_name: name of the teacher's network, as for `create_model`, where `teacher` is a file that does not say it.
        label_smoothing, ignore_index: of the cross-entropies.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        backbone, connectors, loss: the modules; connectors learn with the student and are left behind by `student()`.
        teacher: the `FrozenTeacher`: in evaluation mode, without gradients, in `state_dict()` by path and checksum. Gradients
            pass through its tails to the student.
        stages, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `AdaINLoss` takes them returns in training mode
    a dict with `loss`, `output` and `teacher_output` (logits (N, K)) and the terms `ce`, `mean_1`, ..., `std_1`, ...,
    `transfer_1`, ..., numbered by stage from 1 (scalars before their weights, detached). In evaluation mode, or without
    targets, the dict is `{"output": logits}`.

    Raises:
        LookupError: when a tail of the teacher cannot be found, with the reason.
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import resnet8, resnet14
        >>> from frskd_fast.tasks import AdaINTask
        >>> task = AdaINTask(resnet8(num_classes=10), resnet14(num_classes=10), stages=[1, 2], image_shape=(3, 16, 16))
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)
        ['loss', 'output', 'ce', 'mean_2', 'mean_3', 'std_2', 'std_3', 'transfer_2', 'transfer_3', 'teacher_output']
        >>> parts["loss"].backward()
        >>> all(parameter.grad is None for parameter in task.teacher.parameters())
        True

    Source: Yang et al., arXiv 2003.04289, by its summary; equations and settings are ours, see `AdaINLoss`. The connector is
    that of its first author's later code (KD_SRRL).
    """

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str,
        stages: Sequence[int] | None = None,
        *,
        statistics_weight: float = 1.0,
        transfer_weight: float = 1.0,
        judge: str = "mse",
        temperature: float = 4.0,
        unbiased: bool = True,
        eps: float = 1e-5,
        tails: Sequence[Callable[[Tensor], Tensor]] | None = None,
        image_shape: Sequence[int] | None = None,
        teacher_name: str | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        self.loss = AdaINLoss(
            statistics_weight, transfer_weight, unbiased, eps, judge, temperature,
            label_smoothing=label_smoothing, ignore_index=ignore_index,
        )  # fmt: skip
        if self.loss.statistics_weight == 0.0 and self.loss.transfer_weight == 0.0:
            raise ValueError(
                "statistics_weight and transfer_weight are both 0, but with neither the teacher teaches nothing; use "
                "ClassificationTask."
            )
        self.backbone = with_channels(backbone)
        self.teacher = frozen_teacher(teacher, teacher_name, backbone)
        self.teacher.network = with_channels(self.teacher.network).train(False)
        check_same_classes(self.backbone, self.teacher.network)
        check_same_levels(self.backbone, self.teacher.network)
        widths: Any = self.backbone.channels
        teacher_widths: Any = self.teacher.network.channels
        self.stages = _checked_stages(stages, len(widths))
        self.connectors = nn.ModuleList(connector(widths[stage], teacher_widths[stage]) for stage in self.stages)
        like(backbone, self.connectors)
        # Not as modules of their own: their parameters are the teacher's.
        self._tails: tuple[Callable[[Tensor], Tensor], ...] = ()
        if tails is not None:
            self._tails = _checked_tails(tails, len(self.stages))
        elif self.loss.transfer_weight != 0.0:
            self._tails = tuple(tails_of(self.teacher.network, self.stages, image_shape))
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def may_be_zero(self) -> list[str]:  # type: ignore[override]
        """Terms of weight 0."""
        terms = ["mean", "std"] if self.loss.statistics_weight == 0.0 else []
        terms += ["transfer"] if self.loss.transfer_weight == 0.0 else []
        return [f"{term}_{stage + 1}" for term in terms for stage in self.stages]

    def forward(
        self, images: Tensor, targets: Any = None, teacher_outputs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the dict described above; `teacher_outputs` as in `Task.teacher_outputs`."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": logits_of(self.backbone, images)}
        if teacher_outputs is None:
            with torch.no_grad():
                teacher_outputs = self.teacher_outputs(images)
        teacher_output = teacher_outputs["logits"]
        teacher_features = [teacher_outputs[f"features_{stage + 1}"] for stage in self.stages]
        features, output = features_and_logits(self.backbone, images)
        maps = one_dtype([*self._connected(features), *teacher_features])
        students, teachers = maps[: len(self.stages)], maps[len(self.stages) :]
        moments, teacher_moments = (
            [
                self.loss.moments(one, f"feature map {stage} of the {owner}")
                for stage, one in zip(self.stages, side, strict=True)
            ]
            for owner, side in (("student", students), ("teacher", teachers))
        )
        transferred = []
        if self.loss.transfer_weight != 0.0:
            settings = self.loss.eps, self.loss.unbiased
            if self.teacher.network.training:
                # Where its outputs were handed in, no forward pass has put it back to sleep.
                self.teacher.network.train(False)
            for run_on, content, theirs, ours in zip(self._tails, teachers, teacher_moments, moments, strict=True):
                transferred.append(run_on(adain(content, *ours, *settings, theirs, self.loss.impl)))
        targets = traceable_targets(targets, output, self.loss.ignore_index, self.loss.label_smoothing)
        scores = one_dtype([output, teacher_output, *transferred])
        parts = self.loss(
            scores[0], moments, teacher_moments, scores[2:], scores[1], targets, return_parts=True
        )._asdict()  # fmt: skip
        terms = {"ce": parts["ce"]}
        for name in ("mean", "std", "transfer"):
            terms |= {
                f"{name}_{stage + 1}": value for stage, value in zip(self.stages, parts[name].unbind(), strict=True)
            }
        return {"loss": parts["loss"], "output": output, **terms, "teacher_output": teacher_output}

    def _connected(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps with the teacher's channels."""
        connected = []
        for stage, connect in zip(self.stages, self.connectors, strict=True):
            feature = features[stage]
            if feature.shape[0] * feature.shape[2] * feature.shape[3] == 1:
                raise ValueError(
                    f"images is a batch of one whose feature map {stage} has one pixel, of which the connector's BatchNorm "
                    "can take no statistics; pass two images or more, or larger ones."
                )
            connected.append(connect(feature))
        return connected

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits and its feature maps of the stages; see `Task.teacher_outputs`."""
        features, output = features_and_logits(self.teacher, laid_out(images, self.channels_last))
        return {"logits": output, **{f"features_{stage + 1}": features[stage] for stage in self.stages}}

    def networks(self) -> list[nn.Module]:
        """The student. Tails call layers inside the teacher, so that it is sharded with the task, and connectors as well."""
        return [self.backbone]

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of student and teacher."""
        teacher = features_and_logits(self.teacher, laid_out(images, self.channels_last))[0]
        return {**super().maps(images), "teacher": teacher}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"stages={self.stages}, channels_last={self.channels_last}"


def connector(in_channels: int, out_channels: int) -> nn.Sequential:
    """relu(batch_norm(1x1 convolution)) from the student's channels to the teacher's; weights N(0, 2 / out_channels)."""
    convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.normal_(convolution.weight, 0.0, math.sqrt(2.0 / out_channels))
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _checked_stages(stages: Any, count: int) -> list[int]:
    if stages is None:
        return list(range(max(0, count - LAST_STAGES), count))
    if not isinstance(stages, list | tuple) or not stages:
        raise TypeError(f"stages is {stages!r}, but a list of positions of feature maps was wanted, such as [1, 2].")
    for stage in stages:
        if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage < count:
            raise ValueError(
                f"stages holds {stage!r}, but backbone and teacher hand out {count} feature maps and positions from 0 to "
                f"{count - 1}, finest first, were wanted."
            )
    if list(stages) != sorted(set(stages)):
        raise ValueError(f"stages is {list(stages)}, but rising positions, each once, were wanted.")
    return list(stages)


def _checked_tails(tails: Any, count: int) -> tuple[Callable[[Tensor], Tensor], ...]:
    if not isinstance(tails, list | tuple) or not all(map(callable, tails)):
        raise TypeError(
            f"tails is {tails!r}, but a list of modules or functions from a feature map to logits was wanted."
        )
    if len(tails) != count:
        raise ValueError(f"tails holds {len(tails)}, but one for each of {count} stages was wanted.")
    return tuple(tails)
