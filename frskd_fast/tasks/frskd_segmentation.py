"""FRSKD for semantic segmentation in one module: student, self-teacher and loss (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.losses import SegmentationLoss
from frskd_fast.models import SegmentationNetwork, create_model
from frskd_fast.models.dry_pass import dry_pass
from frskd_fast.ops import _checks

from .base import Student, Task, called, laid_out, one_dtype
from .networks import check_module, like

RAMPS = ("anneal", "constant")


class SegmentationStudent(Student):
    """scores = upsample(backbone.student_maps(images)): class scores (N, K, H, W) at the size of the images, bilinear.

    Args:
        backbone: a segmentation network, as `FRSKDSegmentationTask` takes it.
        channels_last: whether to bring images to `torch.channels_last`.

    Example:
        >>> import torch
        >>> from frskd_fast.models import create_model
        >>> student = SegmentationStudent(create_model("efficientdet_seg_d0", num_classes=5)).eval()
        >>> student(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 64, 96])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores."""
        maps = student_maps_of(self.backbone, laid_out(images, self.channels_last))
        return F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)


class FRSKDSegmentationTask(Task):
    """loss = CE(o_s) + CE(o_t) + r(epoch) * (alpha * KD + beta * sum_l AT_l), o_s and o_t class maps at the labels' size.

    One network with two heads: the student's on its feature pyramid, and the self-teacher's on a second pyramid above that
    one. The terms are those of `SegmentationLoss`. With E epochs and W = `warmup_epochs`, r(e) is 0 for e < W; from there on
    it is exp(-5 (1 - p)^2) with p = (e + 1 - W) / (E - W), at most 1, or 1 throughout. Both cross-entropies count from the
    first epoch.

    With `alpha` = 0 this is the plain baseline, whatever `beta` is, as in the original: loss = CE(o_s), and the self-teacher
    neither runs nor trains.

    Args:
        backbone: a segmentation network, `network(images) -> (student_feats, teacher_feats, student_maps, teacher_maps)` with
            `num_classes` and `student_maps(images)`, such as `frskd_fast.models.EfficientDetSeg`; or any network that
            gives feature maps, which `frskd_fast.models.SegmentationNetwork` makes into one; or a name for `create_model`. It
            is used, not copied.
        num_classes: number of classes K; None takes the backbone's own.
        alpha, beta, temperature, ignore_index: as in `SegmentationLoss`.
        warmup_epochs: W, how many epochs are without distillation.
        ramp_shape: "anneal" or "constant": the form of r after the warm-up.
        ramp_epochs: how many epochs it takes r to grow to 1; None for all after the warm-up, E - W.
        class_weights, label_smoothing: as in `SegmentationLoss`.
        channels_last: keep parameters and images in `torch.channels_last`.

    Attributes:
        backbone: the segmentation network.
        loss: the `SegmentationLoss`.
        ramp: r, a buffer. `start_epoch` sets it; before it is called, r is 1.
        warmup_epochs, ramp_shape, ramp_epochs, channels_last: as given.

    Parameters that no term of the loss reaches are frozen, so that DistributedDataParallel does not wait for them; with
    `alpha` = 0 these are the self-teacher's and what the student has for it alone.

    Calling `task(images, targets=None)` with images (N, C, H, W) and class indices (N, H, W) returns in training mode a dict:

    | key | value |
    | --- | --- |
    | `loss` | scalar, float32 (float64); call `.backward()` on it |
    | `output`, `teacher_output` | class scores (N, K, h, w) of student and self-teacher, attached to the graph |
    | `ce_student`, `ce_teacher`, `kd`, `attention` | scalars before their weights, detached, for logging |

    Scores are at the network's resolution, which the loss brings to the labels'. In evaluation mode, or without targets, the
    student works alone and the dict is `{"output": scores}`. With `alpha` = 0 training gives `loss`, `output` and `ce_student`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from frskd_fast.tasks import FRSKDSegmentationTask
        >>> task = FRSKDSegmentationTask("efficientdet_seg_d0", num_classes=5)
        >>> parts = task(torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64)))
        >>> list(parts)
        ['loss', 'output', 'ce_student', 'ce_teacher', 'kd', 'attention', 'teacher_output']
        >>> task.start_epoch(49, 60)
        >>> round(task.ramp.item(), 4), task.student().eval()(torch.randn(1, 3, 64, 96)).shape
        (0.2865, torch.Size([1, 5, 64, 96]))

    Source: Ji et al., CVPR 2021, section 4.2, and the released code.
    """

    predicts = "maps"
    ramp: Tensor

    def __init__(
        self,
        backbone: nn.Module | str,
        num_classes: int | None = None,
        alpha: float = 1.0,
        beta: float = 50.0,
        temperature: float = 1.0,
        *,
        warmup_epochs: int = 40,
        ramp_shape: str = "anneal",
        ramp_epochs: int | None = None,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.loss = SegmentationLoss(
            alpha, beta, temperature, ignore_index, class_weights=class_weights, label_smoothing=label_smoothing
        )
        if ramp_shape not in RAMPS:
            raise ValueError(f"ramp_shape is {ramp_shape!r}, but 'anneal' or 'constant' was wanted.")
        self.ramp_shape = ramp_shape
        self.warmup_epochs = _at_least("warmup_epochs", warmup_epochs, 0)
        self.ramp_epochs = None if ramp_epochs is None else _at_least("ramp_epochs", ramp_epochs, 1)
        self.backbone = _segmentation_network(backbone, num_classes)
        self._unused = _not_reached(self.backbone, self._what_the_loss_takes)
        for parameter in self.unused_parameters():
            parameter.requires_grad_(False)
        like(self.backbone, self.loss)
        self.register_buffer("ramp", next(self.backbone.parameters()).new_ones(()))
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def start_epoch(self, epoch: int, epochs: int | None = None) -> None:
        """Set r, where there is anything that it weights.

        Raises:
            ValueError: where r grows until the last epoch and `epochs` is not known (None, or -1 as trainers write it).
        """
        if self.loss.alpha != 0.0:
            self.ramp.fill_(self._ramp_of(epoch, None if epochs is None or epochs < 0 else epochs))

    def _ramp_of(self, epoch: int, epochs: int | None) -> float:
        if epochs is not None and epochs <= self.warmup_epochs:
            warnings.warn(
                f"warmup_epochs is {self.warmup_epochs}, but the run has {epochs} epochs, so that nothing is distilled; give a "
                "smaller number.",
                stacklevel=3,
            )
        distilled = epoch + 1 - self.warmup_epochs
        if distilled <= 0:
            return 0.0
        if self.ramp_shape == "constant":
            return 1.0
        length = self.ramp_epochs
        if length is None:
            if epochs is None:
                raise ValueError(
                    "ramp_epochs is None, so that the ramp would end with the last epoch, but how many epochs the run has is "
                    "not known; give ramp_epochs, or ramp_shape='constant'."
                )
            length = max(epochs - self.warmup_epochs, 1)
        return math.exp(-5.0 * (1.0 - min(distilled, length) / length) ** 2)

    @property
    def may_be_zero(self) -> list[str]:  # type: ignore[override]
        """The attention term, where its weight is 0. KD and attention are measured throughout the warm-up."""
        return ["attention"] if self.loss.beta == 0.0 and self.loss.alpha != 0.0 else []

    def unused_parameters(self) -> list[nn.Parameter]:
        """The parameters of the network that no term of the loss reaches."""
        return [self.backbone.get_parameter(name) for name in self._unused]

    def networks(self) -> list[nn.Module]:
        """None: the network has calls of two kinds, of which one is not `forward`, so FSDP shards the task as a whole."""
        return []

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        """Return the dict described above."""
        images = laid_out(images, self.channels_last)
        if targets is None or not self.training:
            return {"output": student_maps_of(self.backbone, images)}
        if self.loss.alpha == 0.0:
            maps = student_maps_of(self.backbone, images)
            loss = self.loss(maps, None, None, None, targets)
            return {"loss": loss, "output": maps, "ce_student": loss.detach()}
        student_feats, teacher_feats, maps, teacher_maps = all_outputs_of(self.backbone, images)
        feats = one_dtype([*student_feats, *teacher_feats])
        levels = len(student_feats)
        parts = self.loss(
            *one_dtype([maps, teacher_maps]),
            feats[:levels],
            feats[levels:],
            targets,
            ramp=self.ramp,
            return_parts=True,
        )._asdict()
        return {"loss": parts.pop("loss"), "output": maps, **parts, "teacher_output": teacher_maps}

    def _what_the_loss_takes(self, images: Tensor) -> list[Tensor]:
        """The outputs of the network through which the loss has gradients."""
        if self.loss.alpha == 0.0:
            return [student_maps_of(self.backbone, images)]
        student_feats, _, maps, teacher_maps = all_outputs_of(self.backbone, images)
        return [maps, teacher_maps, *(student_feats if self.loss.beta != 0.0 else [])]

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Feature maps of the student, and of the self-teacher where there is one."""
        student_feats, teacher_feats, *_ = all_outputs_of(self.backbone, laid_out(images, self.channels_last))
        return {"student": student_feats, **({} if self.loss.alpha == 0.0 else {"self-teacher": teacher_feats})}

    def predicted_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Class scores of the student, and of the self-teacher where there is one."""
        images = laid_out(images, self.channels_last)
        if self.loss.alpha == 0.0:
            return {"student": student_maps_of(self.backbone, images)}
        *_, maps, teacher_maps = all_outputs_of(self.backbone, images)
        return {"student": maps, "self-teacher": teacher_maps}

    def student(self) -> SegmentationStudent:
        """The student alone, `student(images) -> scores` at the size of the images, as `Task.student`."""
        return SegmentationStudent(self.backbone, self.channels_last)

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return (
            f"warmup_epochs={self.warmup_epochs}, ramp_shape={self.ramp_shape!r}, ramp_epochs={self.ramp_epochs}, "
            f"channels_last={self.channels_last}"
        )


def student_maps_of(network: nn.Module, images: Tensor) -> Tensor:
    """The student's class scores (N, K, h, w), without the self-teacher."""
    maps: Tensor = called(network.student_maps, images, "backbone")  # type: ignore[arg-type]
    return maps


def all_outputs_of(network: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The feature maps of student and self-teacher, and the class scores of both."""
    outputs = called(network, images, "backbone")
    if isinstance(outputs, tuple | list) and len(outputs) == 4:
        student_feats, teacher_feats, maps, teacher_maps = outputs
        return list(student_feats), list(teacher_feats), maps, teacher_maps
    raise TypeError(
        f"backbone ({type(network).__name__}) returned a {type(outputs).__name__}, but (student_feats, teacher_feats, "
        "student_maps, teacher_maps) was wanted."
    )


def _segmentation_network(backbone: nn.Module | str, num_classes: int | None) -> nn.Module:
    """The segmentation network that came, or the one around the network that gives feature maps."""
    if isinstance(backbone, str):
        if num_classes is None:
            raise ValueError(f"num_classes is None, but the number of classes of {backbone!r} was wanted.")
        backbone = create_model(backbone, num_classes)
    check_module(backbone, "backbone")
    own = getattr(backbone, "num_classes", None)
    if callable(getattr(backbone, "student_maps", None)):
        if num_classes not in (None, own):
            raise ValueError(
                f"num_classes is {num_classes}, but backbone ({type(backbone).__name__}) scores {own} classes; leave "
                "num_classes out, or build the network for as many."
            )
        return backbone
    num_classes = own if num_classes is None else num_classes
    if num_classes is None:
        raise ValueError(
            f"num_classes is None, and backbone ({type(backbone).__name__}) does not say how many classes there are; give "
            "num_classes."
        )
    return like(backbone, SegmentationNetwork(backbone, num_classes))


def _not_reached(network: nn.Module, outputs: Callable[[Tensor], list[Tensor]]) -> list[str]:
    """The names of the parameters that train and have no gradient from `outputs(images)`, found by a dry pass.

    Of a network that refuses the small images of a dry pass none are found.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    unused: list[str] = []

    def probe(images: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.enable_grad():
            total = torch.stack([output.sum() for output in outputs(images)]).sum()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        unused.extend(name for name, gradient in zip(trained, gradients, strict=True) if gradient is None)
        return [], total

    if trained:
        with contextlib.suppress(RuntimeError):
            dry_pass(network, probe)
    return unused


def _at_least(name: str, value: Any, least: int) -> int:
    number = _checks.whole_number(value, name)
    if number < least:
        raise ValueError(f"{name} is {number}, but at least {least} was wanted.")
    return number
