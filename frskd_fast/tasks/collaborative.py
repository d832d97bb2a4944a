"""CollaborativeTeaching: a student, a scratch teacher beside it and a trained expert (Zhao et al., arXiv 1907.09643)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.losses.collaborative import ATTENTION_ON, CollaborativeTeachingLoss
from frskd_fast.models.registry import created

from .base import Student, Task, features_and_logits, laid_out, logits_of, one_dtype, traceable_targets
from .networks import (
    check_apart,
    check_module,
    check_same_classes,
    check_same_levels,
    frozen_teacher,
    in_order,
    like,
    with_channels,
)


class CollaborativeTeachingTask(Task):
    """loss = CE(scratch) + CE(student) + gamma / B * sum (z_scratch - z_student)^2 + beta * sum_l AT_l.

    The terms are those of `CollaborativeTeachingLoss`. A scratch teacher, a larger network, learns beside the student and hands
    it its logits at every step; a trained expert, which stays as it is, shows where to look.

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`. It is used, not copied.
        scratch: the scratch teacher: a network with fresh weights, which is used, not copied, or the name of one for
            `create_model`, which gets the student's number of classes. With gamma = 0 there is none: None.
        expert: the trained network: a module, a checkpoint file, the folder of a run, or "timm:NAME", see
            `frskd_fast.models.load_teacher`. A module is used, not copied.
        beta, gamma, attention_on, batch_size, alpha, temperature, label_smoothing, ignore_index, resize: as in
            `CollaborativeTeachingLoss`.
        share_stem: let the student use the scratch teacher's first convolution in place of its own, as the released code does.
            Both cross-entropies, the hint and the attention train it.
        expert_name: name of the expert's network, as for `create_model`, where `expert` is a file that does not say it.
        evaluate_scratch: measure the scratch teacher in `evaluate`, too, which takes a pass through it.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        backbone, scratch: the two networks that train. A shared first convolution is one module in both: one parameter, which a
            checkpoint has under the name that it has in each.
        expert: the `FrozenTeacher`: in evaluation mode, without gradients, in `state_dict()` by path and checksum.
        loss: the `CollaborativeTeachingLoss`.
        share_stem, evaluate_scratch, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as the loss takes them returns in training mode
    a dict with `loss` (scalar, float32 or float64), `output` and `scratch_output` (logits (N, K)) and the terms `ce_student`,
    `ce_scratch`, `hint`, `attention_1`, ..., `attention_L` (scalars before their weights, detached; no attention where beta is
    0). With gamma = 0 it has `expert_output` and `kd` in place of what is the scratch teacher's. In evaluation mode, or without
    targets, the dict is `{"output": logits}`. The expert runs once a batch and keeps nothing for a backward pass, so there is
    no `memory` to choose.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn_16_1
        >>> from frskd_fast.tasks import CollaborativeTeachingTask
        >>> task = CollaborativeTeachingTask(wrn_16_1(num_classes=10), "wrn_16_2", wrn_16_1(num_classes=10), share_stem=True)
        >>> parts = task(torch.randn(2, 3, 16, 16), torch.tensor([3, 1]))
        >>> list(parts)[:6]
        ['loss', 'output', 'ce_student', 'scratch_output', 'ce_scratch', 'hint']
        >>> parts["loss"].backward()
        >>> task.backbone.conv1 is task.scratch.conv1
        True

    Source: Zhao et al., 2019 (arXiv 1907.09643), and its released code, which has attention_on "scratch" and shares the stem.
    """

    def __init__(
        self,
        backbone: nn.Module,
        scratch: str | nn.Module | None,
        expert: nn.Module | str,
        beta: float = 1e3,
        gamma: float = 0.03,
        attention_on: str = "student",
        batch_size: int | None = None,
        *,
        share_stem: bool = False,
        alpha: float = 0.9,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        resize: str | None = None,
        expert_name: str | None = None,
        evaluate_scratch: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        self.loss = CollaborativeTeachingLoss(
            beta,
            gamma,
            attention_on,
            batch_size,
            alpha=alpha,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            resize=resize,
        )
        self.backbone = backbone
        self.share_stem = bool(share_stem)
        self.scratch = _scratch_teacher(scratch, backbone, self.loss.gamma, self.share_stem)
        for name, network in (("backbone", backbone), ("scratch", self.scratch)):
            if isinstance(expert, nn.Module) and network is not None:
                check_apart(expert, network, ("expert", name))
        self.expert = frozen_teacher(expert, expert_name, backbone, argument="expert")
        if self.scratch is not None:
            check_same_classes(backbone, self.scratch, "scratch")
        check_same_classes(backbone, self.expert.network, "expert")
        if self.loss.beta != 0.0:
            self.expert.network = with_channels(self.expert.network)
            for name in ATTENTION_ON[attention_on]:
                attribute = "backbone" if name == "student" else name
                setattr(self, attribute, with_channels(getattr(self, attribute)))
                check_same_levels(getattr(self, attribute), self.expert.network, (attribute, "expert"))
        if self.share_stem:
            _share_stem(self.backbone, self.scratch)
        self.evaluate_scratch = bool(evaluate_scratch)
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        features, output = self._outputs("student", self.backbone, images)
        scratch_features: list[Tensor] = []
        teacher_logits = teacher_outputs.get("logits")
        if self.scratch is not None:
            scratch_features, teacher_logits = self._outputs("scratch", self.scratch, images)
        if teacher_logits is not None:
            output, teacher_logits = one_dtype([output, teacher_logits])
        expert_features = in_order(teacher_outputs, "features")
        maps = one_dtype([*features, *scratch_features, *expert_features]) if expert_features else []
        begin, end = len(features), len(features) + len(scratch_features)
        scratch_output, expert_output = (None, teacher_logits) if self.scratch is None else (teacher_logits, None)
        parts = self.loss(
            output,
            scratch_output,
            maps[:begin],
            maps[begin:end],
            maps[end:],
            traceable_targets(targets, output, self.loss.ignore_index, self.loss.label_smoothing),
            expert_output,
            return_parts=True,
        )
        outputs = {"output": output, "ce_student": parts.ce_student}
        if scratch_output is not None:
            outputs |= {"scratch_output": scratch_output, "ce_scratch": parts.ce_scratch, "hint": parts.hint}
        if expert_output is not None:
            outputs |= {"expert_output": expert_output, "kd": parts.kd}
        attention = {f"attention_{level}": value for level, value in enumerate(parts.attention.unbind(), 1)}
        return {"loss": parts.loss, **outputs, **attention}

    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The expert's feature maps and, where gamma is 0, its logits, see `Task.teacher_outputs`; what the loss reads."""
        wanted = ["logits"] if self.scratch is None and self.loss.alpha != 0.0 else []
        images = laid_out(images, self.channels_last)
        if self.loss.beta == 0.0:
            return {name: logits_of(self.expert, images, "expert") for name in wanted}
        features, output = features_and_logits(self.expert, images, name="expert")
        named = {f"features_{number}": feature for number, feature in enumerate(features, 1)}
        return {**dict.fromkeys(wanted, output), **named}

    def _outputs(self, name: str, network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps, where they learn the expert's attention, and logits."""
        argument = "backbone" if name == "student" else name
        if self.loss.beta != 0.0 and name in ATTENTION_ON[self.loss.attention_on]:
            return features_and_logits(network, images, name=argument)
        return [], logits_of(network, images, argument)

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`output`, and with `evaluate_scratch` the `scratch_accuracy`."""
        measured = super().evaluate(images, targets)
        if self.evaluate_scratch and self.scratch is not None:
            output = logits_of(self.scratch, laid_out(images, self.channels_last))
            measured["scratch_accuracy"] = (output.argmax(1) == targets).float().mean()
        return measured

    def scratch_teacher(self) -> Student:
        """The scratch teacher alone, to be taken away as `student()` is."""
        if self.scratch is None:
            raise ValueError("gamma is 0, with which there is no scratch teacher; take student().")
        return Student(self.scratch, self.channels_last)

    def networks(self) -> list[nn.Module]:
        """As of every task, and before the networks a convolution that they share, which both call."""
        return [*([_stem(self.backbone)[1]] if self.share_stem else []), *super().networks()]

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of the student, and of the scratch teacher and the expert where they have some."""
        maps, images = super().maps(images), laid_out(images, self.channels_last)
        others = {"scratch": self.scratch, "expert": self.expert.network}
        described = {
            name: network for name, network in others.items() if network is not None and hasattr(network, "channels")
        }
        return {**maps, **{name: features_and_logits(network, images)[0] for name, network in described.items()}}

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"share_stem={self.share_stem}, channels_last={self.channels_last}"


def _scratch_teacher(
    scratch: str | nn.Module | None, backbone: nn.Module, gamma: float, share_stem: bool
) -> nn.Module | None:
    """The network that `scratch` is or names; None where there is nothing that it would teach."""
    if gamma == 0.0:
        if scratch is not None:
            raise ValueError(
                "gamma is 0, with which the student learns from the expert alone, but scratch is "
                f"{_named(scratch)}; set scratch to None, or gamma above 0."
            )
        return None
    if isinstance(scratch, str):
        classes = getattr(backbone, "num_classes", None)
        if classes is None:
            raise TypeError(
                f"scratch is {scratch!r}, a network with as many classes as the student's, but backbone "
                f"({type(backbone).__name__}) has no num_classes; give scratch as a module, or backbone the attribute."
            )
        return like(backbone, created(scratch, classes, {}, "scratch"))
    if not isinstance(scratch, nn.Module):
        raise TypeError(
            f"scratch is {_named(scratch)}, but a torch.nn.Module or the name of a network (frskd_fast.models.list_models()) "
            "was wanted."
        )
    if scratch is backbone:
        raise ValueError("scratch is the backbone itself, but another network, which teaches it, was wanted.")
    stem = _stem(scratch)[1].parameters() if share_stem else ()  # which the two may share already
    known = {id(parameter) for parameter in backbone.parameters()} - {id(parameter) for parameter in stem}
    if any(id(parameter) in known for parameter in scratch.parameters()):
        raise ValueError(
            f"scratch ({type(scratch).__name__}) and backbone ({type(backbone).__name__}) have parameters in common, but two "
            "networks were wanted, the first of which teaches the other; for a common first convolution set share_stem to true."
        )
    return scratch


def _named(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"


def _stem(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first convolution in the order of the network's modules, and its name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(
        f"share_stem is true, but {type(network).__name__} has no torch.nn.Conv2d; set share_stem to false."
    )


def _share_stem(student: nn.Module, scratch: nn.Module | None) -> None:
    """Put the scratch teacher's first convolution into the student."""
    if scratch is None:
        raise ValueError("share_stem is true, but gamma is 0, with which there is no scratch teacher; set it to false.")
    (name, own), (_, shared) = _stem(student), _stem(scratch)
    if repr(own) != repr(shared):
        raise ValueError(
            f"share_stem is true, but scratch ({type(scratch).__name__}) begins with {shared} and backbone "
            f"({type(student).__name__}) with {own}; take networks that begin alike, or set share_stem to false."
        )
    parent, _, last = name.rpartition(".")
    setattr(student.get_submodule(parent), last, shared)
