"""FRSKD in one module: student, self-teacher and loss (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast.losses import FitNetLoss, FRSKDLoss, OverhaulLoss, SLALoss
from frskd_fast.losses.base import DistillationLoss, channels_of, declared
from frskd_fast.mixing import rotate4
from frskd_fast.models import BiFPN, BiFPNc
from frskd_fast.models.dry_pass import dry_pass

from .base import Task, features_and_logits, laid_out, one_dtype, traceable_targets
from .networks import check_takes_preact, like, with_channels
from .recompute import recomputed

MEMORY = ("normal", "low")
DISTILL: dict[str, type[DistillationLoss]] = {"att": FRSKDLoss, "fit": FitNetLoss, "od": OverhaulLoss}


class _Outputs(NamedTuple):
    features: list[Tensor]
    logits: Tensor
    teacher_features: Sequence[Tensor]
    teacher_logits: Tensor


class FRSKDTask(Task):
    """loss = CE(student) + CE(self-teacher) + alpha * KD + beta * sum_l AT_l, all three modules in one forward pass.

    Everything that trains is a submodule, so that DistributedDataParallel, FSDP, autocast and torch.compile see one module
    whose forward ends in the loss; features are never cast or copied between the networks and the loss.

    Args:
        backbone: the student, `backbone(images) -> (features, logits)`, finest map first: a network of
            `frskd_fast.models`, an adapted one (`adapt_backbone`), or your own. It is used, not copied.
        self_teacher: `self_teacher(features) -> (features, logits)`. None builds `BiFPNc` for the backbone's `.channels`;
            a backbone without them goes through `adapt_backbone` first.
        loss: called as `FRSKDLoss` with `return_parts=True`. None is `FRSKDLoss()`, the paper's CIFAR-100 recipe:
            alpha 2, beta 100, temperature 4. `OverhaulLoss` (any loss with a true `needs_preact`) is given feature maps before
            their last ReLU; with `SLALoss` the networks see the rotated images, too. Parameters of the loss, adapters
            and heads, are parameters of the task. `build_frskd` chooses and sizes all of this by name.
        num_classes: number of logits K of the self-teacher built here; None takes the backbone's own.
        memory: "normal", or "low" to keep none of the self-teacher's intermediate maps for backward and compute them a
            second time there. Losses, gradients and statistics are the same. The price is one more forward of the
            self-teacher in each step: its three passes (one forward, two backward) become four.
        channels_last: keep parameters and images in `torch.channels_last`, the layout in which convolutions and this
            library's attention read whole pixels. Parameters are converted here, once; images at each call. False leaves
            every layout as it is.

    Attributes:
        backbone, self_teacher, loss: the three modules; their names lead the keys of `state_dict()`.
        memory, channels_last: as given.

    Calling `task(images, targets=None)` with images (N, C, H, W) and targets as `FRSKDLoss` takes them (class indices (N,);
    `(targets_a, targets_b, lam)` of mixup or cutmix; probabilities (N, K)) returns in training mode a dict:

    | key | value |
    | --- | --- |
    | `loss` | scalar, float32 (float64); call `.backward()` on it |
    | `output`, `teacher_output` | logits (N, K) of student and self-teacher, attached to the graph |
    | `ce_student`, `ce_teacher`, `kd`, `feature` | scalars before their weights, detached, for logging |
    | `joint`, `sla` | with `SLALoss`: the same of its terms |

    In evaluation mode, or without targets, the student works alone and the dict is `{"output": logits}`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import FRSKDTask
        >>> task = FRSKDTask(wrn16x2(num_classes=10))
        >>> parts = task(torch.randn(4, 3, 16, 16), torch.arange(4))
        >>> list(parts)
        ['loss', 'output', 'ce_student', 'ce_teacher', 'kd', 'feature', 'teacher_output']
        >>> parts["loss"].backward()
        >>> task.student().eval()(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 10])

    Source: Ji et al., CVPR 2021, section 3; the dict is that of timm's training tasks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        self_teacher: nn.Module | None = None,
        loss: nn.Module | None = None,
        *,
        num_classes: int | None = None,
        memory: str = "normal",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("self_teacher", self_teacher), ("loss", loss)):
            if not isinstance(module, nn.Module) and (module is not None or name == "backbone"):
                raise TypeError(f"{name} is a {type(module).__name__}, but a torch.nn.Module was wanted.")
        if memory not in MEMORY:
            raise ValueError(f"memory is {memory!r}, but 'normal' or 'low' was wanted.")
        if self_teacher is None:
            backbone = with_channels(backbone)
        self_teacher = _self_teacher(backbone, self_teacher, num_classes)
        self.backbone = backbone
        self.self_teacher = self_teacher
        self.loss = FRSKDLoss() if loss is None else loss
        if self._preact:
            check_takes_preact(backbone, "backbone", self.loss)
            check_takes_preact(self_teacher, "self_teacher", self.loss)
        if not set(self_teacher.modules()).issuperset(declared(self.loss, "teacher_modules")):
            raise ValueError(
                "loss takes live margins from another self-teacher than the task's; build the self-teacher first, and "
                "hand the same one to OverhaulLoss and FRSKDTask."
            )
        self.memory = memory
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def may_be_zero(self) -> list[str]:  # type: ignore[override]
        """The feature term, where its weight is 0."""
        losses = [module for module in self.loss.modules() if isinstance(module, DistillationLoss)]
        return ["feature"] if any(loss.beta == 0.0 for loss in losses) else []

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        if targets is None or not self.training:
            return {"output": features_and_logits(self.backbone, laid_out(images, self.channels_last))[1]}
        # "one" or "two" passes over rotated images, where the loss asks for them.
        passes = declared(self.loss, "passes")
        outputs = self._outputs(rotate4(images) if passes == "one" else images)
        logits, teacher_logits = outputs.logits, outputs.teacher_logits
        pyramids = [outputs.features, outputs.teacher_features]
        if passes == "two":
            rotated = self._outputs(rotate4(images))
            pyramids += [rotated.features, rotated.teacher_features]
        elif passes is None:
            settings = declared(self.loss, "ignore_index"), declared(self.loss, "label_smoothing")
            targets = traceable_targets(targets, logits, *settings)
        loss_features = iter(one_dtype([feature for pyramid in pyramids for feature in pyramid]))
        students, teachers, *more = [[next(loss_features) for _ in pyramid] for pyramid in pyramids]
        arguments = {"rotated_student_feats": more[0], "rotated_teacher_feats": more[1]} if more else {}
        loss_logits = one_dtype([logits, teacher_logits])
        parts = self.loss(*loss_logits, students, teachers, targets, return_parts=True, **arguments)._asdict()
        if passes == "one":
            logits, teacher_logits = logits[::4], teacher_logits[::4]
        return {"loss": parts.pop("loss"), "output": logits, **parts, "teacher_output": teacher_logits}

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of the student, and what the self-teacher makes of them."""
        features = super().maps(images)["student"]
        return {"student": features, "self-teacher": list(self.self_teacher(features)[0])}

    @property
    def _preact(self) -> bool:
        return bool(declared(self.loss, "needs_preact"))

    def _outputs(self, images: Tensor) -> _Outputs:
        """What both networks make of `images`."""
        images = laid_out(images, self.channels_last)
        features, logits = features_and_logits(self.backbone, images, self._preact)
        return _Outputs(features, logits, *self._taught(features))

    def _taught(self, features: list[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        if self.memory == "normal" or not torch.is_grad_enabled():
            return _self_teacher_outputs(self.self_teacher, self._preact, features)
        # Their state is read from the device, which a CUDA graph does not allow. These two draw none.
        draws_random_numbers = type(self.self_teacher) not in (BiFPN, BiFPNc)
        function = functools.partial(_self_teacher_outputs, self.self_teacher, self._preact)
        outputs = recomputed(self.self_teacher, function, features, draws_random_numbers=draws_random_numbers)
        teacher_features, teacher_logits = outputs
        return teacher_features, teacher_logits

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"memory={self.memory!r}, channels_last={self.channels_last}"


def build_frskd(
    backbone: nn.Module,
    distill: str = "att",
    auxiliary: str | None = None,
    *,
    alpha: float = 2.0,
    beta: float | None = None,
    temperature: float = 4.0,
    auxiliary_weight: float = 1.0,
    self_teacher: nn.Module | str | None = None,
    width: int = 2,
    depth: int = 2,
    repeat: int = 1,
    num_channels: int = 256,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
    margins: str = "initial",
    passes: str = "two",
    memory: str = "normal",
    channels_last: bool = True,
) -> FRSKDTask:
    """CE(student) + CE(self-teacher) + alpha * KD + beta * D (+ the terms of `SLALoss`): an `FRSKDTask`, its parts by name.

    The names are those of the original's command line (`--distill`, `--aux`, `--bifpn`).

    Args:
        backbone: as for `FRSKDTask`. Self-teacher and loss come to its device and into its dtype.
        distill: D: "att" (`FRSKDLoss`), "fit" (`FitNetLoss`) or "od" (`OverhaulLoss`).
        auxiliary: None, or "sla" (`SLALoss`).
        alpha, temperature: of KD.
        beta: weight of D; None is the default of the loss: 100 for "att" and "fit", 1e-3 for "od".
        auxiliary_weight: of SLA (`--aux_lamb`).
        self_teacher: None or "BiFPNc", "BiFPN", or a module (with `.out_channels` for "fit" and "sla", with
            `.get_bn_before_relu()` for "od").
        width: `BiFPNc` is `width` times as wide as the backbone at each level.
        depth, repeat: convolutions in a node and pyramid layers, of both.
        num_channels: width of every level of `BiFPN`.
        num_classes: K of a self-teacher built here; None takes the backbone's own.
        label_smoothing: of every cross-entropy.
        margins: "initial" or "live", of `OverhaulLoss`.
        passes: "two" or "one", of `SLALoss`.
        memory, channels_last: as for `FRSKDTask`.

    Returns:
        The task.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import build_frskd
        >>> task = build_frskd(wrn16x2(num_classes=10), "od", "sla", self_teacher="BiFPN", num_channels=64)
        >>> parts = task(torch.randn(2, 3, 16, 16), torch.tensor([3, 1]))
        >>> list(parts)
        ['loss', 'output', 'ce_student', 'ce_teacher', 'kd', 'feature', 'joint', 'sla', 'teacher_output']
        >>> parts["loss"].backward()

    Source: the options of FRSKD's released script (Ji et al., CVPR 2021).
    """
    if distill not in DISTILL:
        raise ValueError(f"distill is {distill!r}, but 'att', 'fit' or 'od' was wanted.")
    if auxiliary not in (None, "sla"):
        raise ValueError(f"auxiliary is {auxiliary!r}, but None or 'sla' was wanted.")
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone is a {type(backbone).__name__}, but a torch.nn.Module was wanted.")
    backbone = with_channels(backbone)
    self_teacher = _self_teacher(backbone, self_teacher, num_classes, width, depth, repeat, num_channels)
    channels = list(backbone.channels)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"alpha": alpha, "temperature": temperature, "label_smoothing": label_smoothing}
    if beta is not None:
        settings["beta"] = beta
    if distill == "od":
        settings["margins"] = margins
    distillation = DISTILL[distill].for_networks(channels, self_teacher, **settings)
    loss: nn.Module = distillation
    if auxiliary == "sla":
        classes = _number_of_classes(backbone, num_classes)
        widths = channels[-1], channels_of(self_teacher)[-1]
        loss = SLALoss(distillation, *widths, classes, auxiliary_weight, passes=passes)
    return FRSKDTask(backbone, self_teacher, like(backbone, loss), memory=memory, channels_last=channels_last)


def _self_teacher(
    backbone: nn.Module,
    self_teacher: nn.Module | str | None,
    num_classes: int | None,
    width: int = 2,
    depth: int = 2,
    repeat: int = 1,
    num_channels: int = 256,
) -> nn.Module:
    """The self-teacher that came, or the one called so for the backbone's channels, on its device and in its dtype."""
    if isinstance(self_teacher, nn.Module):
        if num_classes is not None:
            raise ValueError(
                f"num_classes is {num_classes}, but self_teacher came with a classifier of its own; leave one of them out."
            )
        return self_teacher
    channels, num_classes = list(backbone.channels), _number_of_classes(backbone, num_classes)  # type: ignore[arg-type]
    if self_teacher in (None, "BiFPNc"):
        return like(backbone, BiFPNc(channels, num_classes, width, depth, repeat))
    if self_teacher == "BiFPN":
        return like(backbone, BiFPN(channels, num_classes, num_channels, depth, repeat))
    raise ValueError(f"self_teacher is {self_teacher!r}, but None, 'BiFPNc', 'BiFPN' or a module was wanted.")


def _number_of_classes(backbone: nn.Module, num_classes: int | None) -> int:
    if num_classes is None:
        num_classes = getattr(backbone, "num_classes", None)
    if num_classes is None:
        num_classes = dry_pass(backbone, functools.partial(features_and_logits, backbone))[1].shape[1]
    return num_classes


def _self_teacher_outputs(self_teacher: nn.Module, preact: bool, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    teacher_features, teacher_logits = self_teacher(features, preact=True) if preact else self_teacher(features)
    return list(teacher_features), teacher_logits
