"""What all losses share: the call, what a loss wants of a task, the checks, and FRSKD's objective around a feature term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, attention, logits, objective
from frskd_fast.ops.labels import checked_labels
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Settings

Parts = TypeVar("Parts", bound=tuple[Any, ...])
# The student's feature maps and the teacher's, finest first.
Pyramids = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Loss(nn.Module, Generic[Parts]):
    """A loss as tasks call it: `loss(*outputs, targets)` is a scalar, with ``return_parts=True`` a named tuple.

    The first field of the tuple is ``loss``, the others are detached and unweighted. A subclass defines
    ``forward(..., *, return_parts=False)`` and declares what it wants of a task, on the class or on the instance:

    Attributes:
        needs_features: whether feature maps are wanted; without them the call is ``loss(student_logits, teacher_logits,
            targets)``, and the cross-entropy in it is the student's alone.
        needs_preact: whether feature maps are wanted before their last ReLU, ``backbone(images, preact=True)``.
        passes: ``"one"`` for outputs of the images' four rotations, ``"two"`` for those of the images and of the rotations
            (arguments ``rotated_student_feats``, ``rotated_teacher_feats``); None for those of the images alone.
        label_smoothing, ignore_index: of its cross-entropies.
        teacher_modules: modules of the self-teacher that the loss reads.
        shown: names of the attributes that ``print(loss)`` shows.
    """

    needs_features: bool = True
    needs_preact: bool = False
    passes: str | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    teacher_modules: tuple[nn.Module, ...] = ()
    shown: tuple[str, ...] = ()

    if TYPE_CHECKING:

        @overload
        def __call__(self, *outputs: Any, return_parts: Literal[False] = False, **more: Any) -> Tensor: ...

        @overload
        def __call__(self, *outputs: Any, return_parts: Literal[True], **more: Any) -> Parts: ...

        def __call__(self, *outputs: Any, return_parts: bool = False, **more: Any) -> Tensor | Parts: ...

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


def declared(loss: nn.Module, name: str) -> Any:
    """What `loss` declares under `name`, one of the attributes of `Loss`; a module that says nothing has its default.

    Example:
        >>> declared(nn.MSELoss(), "needs_preact")
        False
    """
    return getattr(loss, name, getattr(Loss, name))


def zero_of(rows: Tensor) -> Tensor:
    """0 as a function of `rows`, whose gradient is zeros whatever they hold: a loss of no terms or of no images."""
    zero: Tensor = rows[:0].sum(dtype=accumulate_dtype(rows.dtype))
    return zero


class FRSKDLossParts(NamedTuple):
    """What ``FRSKDLoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    kd: Tensor
    feature: Tensor


class DistillationLoss(Loss[FRSKDLossParts]):
    """alpha * KD + beta * D, and with targets also CE(student) + CE(teacher); a subclass gives D by `feature_term`.

    Args, Raises: as for `FRSKDLoss`.

    Attributes:
        alpha, beta, temperature, impl, label_smoothing, ignore_index: as given.
        exponent: of the attention maps, where D is attention transfer, which then is part of one fused operation; else None.
        resize: ``"pool"`` where maps of different size are pooled; None makes them an error.
    """

    exponent: float | None = None
    resize: str | None = None
    shown: tuple[str, ...] = ("alpha", "beta", "temperature", "impl")

    def __init__(
        self, alpha: float, beta: float, temperature: float, impl: str, label_smoothing: float, ignore_index: int
    ) -> None:
        super().__init__()
        self.alpha = _checks.finite_number(alpha, "alpha")
        self.beta = _checks.finite_number(beta, "beta")
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    @classmethod
    def from_args(cls, args: Any, impl: str = "auto", **settings: Any) -> Self:
        """Build the loss from the original script's namespace (``args.alpha``, ``args.beta``, ``args.temperature``)."""
        return cls(alpha=args.alpha, beta=args.beta, temperature=args.temperature, impl=impl, **settings)

    @classmethod
    def for_networks(cls, student_channels: Sequence[int], self_teacher: nn.Module, **settings: Any) -> Self:
        """The loss for maps of these channels and for those of `self_teacher`, with adapters where it has any."""
        return cls(**settings)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: Any,
        teacher_feats: Any,
        targets: Any = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | FRSKDLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (N, K) raw logits of the network; float32, bfloat16, float16 or float64, any strides.
            teacher_logits: (N, K) raw logits of the self-teacher, same dtype and device.
            student_feats: list, tuple or dict of L feature maps (N, C_l, H_l, W_l); one dtype, any strides. Without targets
                their batch may differ from that of the logits, which they do not meet.
            teacher_feats: L maps (N, D_l, H_l, W_l) of the self-teacher; channels may differ, pixels may not. They get no
                gradient from here.
            targets: None, class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities (N, K).
            return_parts: return ``FRSKDLossParts`` instead of the scalar.
        """
        students, teachers = checked_outputs(
            student_logits, teacher_logits, student_feats, teacher_feats, self.resize, one_batch=targets is not None
        )
        name = _dispatch.choose_for("objective", self.impl, student_logits)
        labels = checked_labels(
            targets, (student_logits,), False, self.ignore_index, check_range=_dispatch.is_plain(name)
        )
        fused = self.exponent is not None and self.beta != 0.0
        settings = objective.Objective(
            self.alpha,
            self.beta if fused else 0.0,
            self.exponent or 2.0,
            Settings(labels.mix, self.label_smoothing, self.ignore_index, self.temperature),
        )
        maps: Pyramids = (students, teachers) if fused else ((), ())
        total, terms = objective.objective(student_logits, teacher_logits, labels, *maps, settings, name)
        parts = FRSKDLossParts(total, terms[1], terms[2], terms[3], terms[4])
        if self.beta != 0.0 and not fused:
            feature = self.feature_term(students, teachers)
            parts = parts._replace(loss=total + self.beta * feature, feature=feature.detach())
        return parts if return_parts else parts.loss

    def logit_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Any = None,
        reduction: str = "batchmean",
        ignore_index: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CE(student), CE(teacher), both 0 without targets, and KD, which does not reach the teacher."""
        ignored = self.ignore_index if ignore_index is None else ignore_index
        settings = self.temperature, self.label_smoothing, ignored, reduction, True, self.impl
        return logits.logit_losses(student_logits, teacher_logits, targets, *settings)

    def feature_rows(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor | None:
        """D of each image, (N,), where D is their mean; None where images meet in D, as in a BatchNorm's statistics."""
        return None

    def feature_term(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """D, the feature term before its weight, a scalar; of checked maps."""
        rows = self.feature_rows(students, teachers)
        if rows is None:
            raise NotImplementedError(f"{type(self).__name__} has neither feature_rows nor feature_term.")
        return rows.sum() / max(rows.shape[0], 1)


def checked_outputs(
    student_logits: Any,
    teacher_logits: Any,
    student_feats: Any,
    teacher_feats: Any,
    resize: str | None = None,
    *,
    one_batch: bool = True,
) -> Pyramids:
    """Raise unless logits and feature maps of student and self-teacher fit; return the maps, of equal sizes.

    `one_batch` says whether features and logits have to be of the same images.
    """
    logits.checked_logits(student_logits, teacher_logits, "")
    if teacher_logits is None:
        raise TypeError("teacher_logits is None, but the self-teacher's logits were wanted.")
    students, teachers = attention.checked_pyramids(student_feats, teacher_feats, resize)
    check_beside_logits(students[0], "student_feats[0]", student_logits, one_batch=one_batch)
    return students, teachers


def check_beside_logits(
    feature: Tensor, name: str, logits: Tensor, logits_name: str = "student_logits", *, one_batch: bool = True
) -> None:
    """Raise unless `feature`, which the errors call `name`, fits into one loss with the student's `logits`.

    `one_batch` says whether both have to be of the same images.
    """
    if feature.device != logits.device:
        raise ValueError(
            f"{name} is on {feature.device}, but {logits_name} is on {logits.device} and one device was wanted."
        )
    if one_batch and feature.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{name} has batch size {feature.shape[0]}, but {logits_name} has {logits.shape[0]} and one batch size was "
            "wanted."
        )
    if (feature.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise TypeError(
            f"{name} has dtype {feature.dtype}, but {logits_name} has {logits.dtype} and either both or neither in float64 "
            "was wanted; cast one of them."
        )


def check_beside_parameters(feature: Tensor, name: str, loss: nn.Module, weight: Tensor) -> None:
    """Raise unless `feature`, which the errors call `name`, and `loss`'s parameter `weight` can be computed with."""
    owner = type(loss).__name__
    if feature.device != weight.device:
        raise ValueError(
            f"{name} is on {feature.device}, but the parameters of {owner} are on {weight.device} and one device was "
            f"wanted; move the loss with .to({str(feature.device)!r})."
        )
    if (feature.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"{name} has dtype {feature.dtype}, but the parameters of {owner} have {weight.dtype} and either both or "
            f"neither in float64 was wanted; convert the loss with .to({feature.dtype})."
        )


def weight_tensor(weight: Tensor, name: str, like: Tensor) -> Tensor:
    """`weight`, which the errors call `name`, as a scalar without a gradient in the accumulate dtype of `like`."""
    if weight.numel() != 1 or not weight.is_floating_point() or weight.device != like.device:
        raise ValueError(
            f"{name} is a tensor of shape {tuple(weight.shape)} and dtype {weight.dtype} on {weight.device}, but a number, or "
            f"a floating-point tensor of one element on {like.device}, was wanted."
        )
    return weight.detach().reshape(()).to(accumulate_dtype(like.dtype))


def channels_of(self_teacher: nn.Module) -> list[int]:
    """The channels of the (self-)teacher's maps, finest first, by which adapters and heads are sized."""
    widths = getattr(self_teacher, "out_channels", None) or getattr(self_teacher, "channels", None)
    if not isinstance(widths, list | tuple):
        raise TypeError(
            f"self_teacher ({type(self_teacher).__name__}) has no list out_channels or channels, but those of its maps "
            "were wanted to size adapters and heads; give it the attribute, or build the loss and the task yourself."
        )
    return list(widths)


def plain_formulas(impl: str, feature: Tensor) -> bool:
    """Whether `impl` leaves the gradients of tensors such as `feature` to autograd."""
    return _dispatch.is_plain(_dispatch.choose_for("hints", impl, feature))
