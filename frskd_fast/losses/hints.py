"""FRSKD with other feature terms: FitNet's hints and the overhaul distance, on adapted student maps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.losses.base import DistillationLoss, channels_of, check_beside_parameters, plain_formulas
from frskd_fast.ops._autograd import anchor, once_differentiable
from frskd_fast.reference import hints as reference
from frskd_fast.reference.dtypes import accumulate_dtype

MARGINS = ("initial", "live")


def wide_range(kind: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast to float16 on devices of this kind: sums over large features would leave float16's range."""
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class _FeatureDistance(torch.autograd.Function):
    """sum_l weight_l * distance_l of all levels. One map a level is kept: half of the gradient that backward scales."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: tuple[float, ...],  # of each level, the divisor of its mean included
        overhaul: bool,
        *tensors: Tensor,  # students, teachers, margins for the overhaul distance, anchors of the students
    ) -> Tensor:
        levels = len(weights)
        total: Tensor | None = None
        differences = []
        for level, weight in enumerate(weights):
            student, teacher = tensors[level], tensors[levels + level]
            if overhaul:
                difference = _overhaul_difference(student, teacher, tensors[2 * levels + level])
                distance = difference.square().sum() * weight
            else:
                # Negative maps count in the distance (t^2) but get no gradient.
                rectified = F.relu(student.to(accumulate_dtype(student.dtype))).sub_(teacher)
                distance = rectified.square().sum() * weight
                difference = torch.ops.aten.threshold_backward(rectified, student, 0)
            total = distance if total is None else total + distance
            if ctx.needs_input_grad[2 + level]:
                differences.append(difference)
        assert total is not None
        ctx.save_for_backward(*differences, *tensors[-levels:])
        ctx.settings = weights, [student.dtype for student in tensors[:levels]], len(tensors) - levels
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, dtypes, others = ctx.settings
        saved = iter(ctx.saved_tensors)
        students = [
            (next(saved) * (2.0 * weight * grad)).to(dtype) if needed else None
            for weight, dtype, needed in zip(weights, dtypes, ctx.needs_input_grad[2:], strict=False)
        ]
        return (None, None, *students, *([None] * others))


def feature_distance(
    weights: tuple[float, ...],
    overhaul: bool,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    margins: Sequence[Tensor] = (),
) -> Tensor:
    """sum_l weight_l * distance_l, with gradients to the students alone."""
    total: Tensor = _FeatureDistance.apply(weights, overhaul, *students, *teachers, *margins, *map(anchor, students))
    return total


def _overhaul_difference(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """s - u where it counts (s > u or u > 0), else 0, with u = max(t, margin)."""
    # The margin's dtype is that of the arithmetic; it takes half-precision maps along without a copy of them.
    target = torch.maximum(teacher, margin)
    difference = student - target
    # It counts exactly where the larger of the two is positive; NaN counts.
    counting: Tensor = torch.ops.aten.threshold_backward(difference, target.clamp_(min=difference), 0)
    return counting


class HintLoss(DistillationLoss):
    """What `FitNetLoss` and `OverhaulLoss` share: adapters of the student's maps, whose distance to the teacher's a subclass
    gives.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        impl: str = "auto",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(alpha, beta, temperature, impl, label_smoothing, ignore_index)
        students = _checked_channels(student_channels, "student_channels")
        teachers = _checked_channels(teacher_channels, "teacher_channels")
        if len(students) != len(teachers):
            raise ValueError(
                f"teacher_channels lists {len(teachers)} levels, but student_channels lists {len(students)} and the same "
                "number was wanted."
            )
        self.student_channels, self.teacher_channels = students, teachers
        self.linear = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))
            for student, teacher in zip(students, teachers, strict=True)
        )

    def distance(self, adapted: list[Tensor], teachers: list[Tensor], plain: bool) -> Tensor:
        """The feature term before its weight; `plain` asks for the reference's formula."""
        raise NotImplementedError

    def feature_term(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The feature term before its weight, a scalar; of checked maps."""
        self._check_channels(students, teachers)
        first = students[0]
        if first.shape[0] == 0:
            # BatchNorm has no statistics of an empty batch; everything that trains still gets its (zero) gradient.
            zeros = [tensor.sum() * 0 for tensor in (*students, *self.linear.parameters())]
            return torch.stack([zero.to(accumulate_dtype(first.dtype)) for zero in zeros]).sum()
        return self.distance(
            self._adapted(students), [teacher.detach() for teacher in teachers], plain_formulas(self.impl, first)
        )

    def _adapted(self, students: Sequence[Tensor]) -> list[Tensor]:
        """BatchNorm(conv1x1(f)) of each level, in the adapters' dtype or autocast's."""
        adapted = []
        for level, (adapter, feature) in enumerate(zip(self.linear, students, strict=True)):
            weight = cast(nn.Sequential, adapter)[0].weight
            if self.training and feature.shape[0] * feature.shape[2] * feature.shape[3] == 1:
                raise ValueError(
                    f"student_feats[{level}] has shape {tuple(feature.shape)}, but the adapter's BatchNorm in training mode "
                    "wants more than one value per channel; use a larger batch, or eval()."
                )
            with wide_range(feature.device.type):
                adapted.append(adapter(feature.to(cast(Tensor, weight).dtype)))
        return adapted

    def _check_channels(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
        weight = next(self.linear.parameters())
        for side, features, channels in (
            ("student", students, self.student_channels),
            ("teacher", teachers, self.teacher_channels),
        ):
            if len(features) != len(channels):
                raise ValueError(
                    f"{side}_feats has {len(features)} levels, but {type(self).__name__} was built for {len(channels)}; "
                    "pass these levels, or build the loss for the others."
                )
            for level, (feature, count) in enumerate(zip(features, channels, strict=True)):
                if feature.shape[1] != count:
                    raise ValueError(
                        f"{side}_feats[{level}] has {feature.shape[1]} channels, but {type(self).__name__} was built for "
                        f"{side}_channels={channels}; build it for the channels of your networks."
                    )
        check_beside_parameters(students[0], "student_feats[0]", self, weight)


class FitNetLoss(HintLoss):
    """alpha * KD + beta * sum_l FIT_l, and with targets also CE(student) + CE(teacher).

    ``alpha`` multiplies KD as in `FRSKDLoss`.
    ``beta`` multiplies FIT_l = mean over N*C*H*W of (relu(s) - t)^2 with s = BatchNorm(conv1x1(student_feats[l])) and
    t = teacher_feats[l] detached. The adapters (convolution without bias, BatchNorm) are parameters of the loss: give them
    to the optimiser and move them to the device. In evaluation mode their BatchNorms use running statistics.
    Squares and sums are float32 (float64 for float64 inputs). The adapters run in their parameters' dtype, or in bfloat16 under
    such an autocast; one to float16 is left out for them, so that large features stay finite.

    Args:
        student_channels: channels of the student's maps, finest first: the backbone's ``.channels``.
        teacher_channels: channels of the self-teacher's maps: its ``.out_channels``.
        alpha: weight of KD, finite. FRSKD's CIFAR-100 recipe: 2.
        beta: weight of the summed hints, finite; 0 skips them, adapters included. FRSKD names no value for hints; 100 is
            RepDistiller's.
        temperature: T > 0 of both softmaxes.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``: of the logits' terms. The hints are
            PyTorch operations with one saved map a level; ``"reference"`` leaves their gradient to autograd.
        label_smoothing, ignore_index: of both cross-entropies, as in `FRSKDLoss`.

    Attributes:
        linear: the adapters; parameters are called ``linear.{l}.0.weight`` (convolution), ``linear.{l}.1.*`` (BatchNorm).
        needs_preact: False: features come from behind their last ReLU.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import FitNetLoss
        >>> criterion = FitNetLoss([64], [128], alpha=2.0, beta=1.0)
        >>> logits = torch.zeros(8, 100, requires_grad=True)
        >>> student_feats, teacher_feats = [torch.randn(8, 64, 4, 4)], [torch.zeros(8, 128, 4, 4)]
        >>> loss = criterion(logits, torch.zeros(8, 100), student_feats, teacher_feats)
        >>> round(loss.item(), 1)  # half of a normalised map lies below zero
        0.5
        >>> loss.backward()

    Source: the feature loss "fit" of FRSKD's released code (Ji et al., CVPR 2021), after Romero et al., ICLR 2015, eq. 3.
    """

    @classmethod
    def for_networks(cls, student_channels: Sequence[int], self_teacher: nn.Module, **settings: Any) -> Self:
        """The loss with adapters from these channels to those of `self_teacher`'s maps."""
        return cls(student_channels, channels_of(self_teacher), **settings)

    def distance(self, adapted: list[Tensor], teachers: list[Tensor], plain: bool) -> Tensor:
        """sum_l mean (relu(s_l) - t_l)^2."""
        if plain:
            return torch.stack([reference.fitnet_distance(s, t) for s, t in zip(adapted, teachers, strict=True)]).sum()
        return feature_distance(tuple(1.0 / s.numel() for s in adapted), False, adapted, teachers)


class OverhaulLoss(HintLoss):
    """alpha * KD + beta * sum_l OD_l / 2^(L-1-l), and with targets also CE(student) + CE(teacher).

    ``alpha`` multiplies KD as in `FRSKDLoss`.
    ``beta`` multiplies the distances OD_l = (1/N) * sum_{n,c,h,w} (s - u)^2 [s > u or u > 0] with
    s = BatchNorm(conv1x1(student_feats[l])) and u = max(teacher_feats[l], margin_l) detached; both features before their last
    ReLU. margin_l is, for each channel, E[t | t < 0] of a teacher map that is normal with the bias and the weight of its
    BatchNorm as mean and deviation. The adapters are parameters of the loss: give them to the optimiser and move them to the
    device. Precision as in `FitNetLoss`.

    Args:
        student_channels: channels of the student's maps, finest first: the backbone's ``.channels``.
        teacher: the self-teacher (anything with ``get_bn_before_relu()``, the BatchNorms that make its maps, finest first),
            or the channels of its maps, whose BatchNorms are then taken to be fresh: all margins -0.79788.
        alpha: weight of KD, finite. FRSKD's CIFAR-100 recipe: 2.
        beta: weight of the summed distances, finite; 0 skips them, adapters included. FRSKD names no value; 1e-3 is that
            of the overhaul paper's CIFAR code (1e-4 in its ImageNet code). The distance is a sum over pixels and channels.
        temperature: T > 0 of both softmaxes.
        impl: as in `FitNetLoss`.
        margins: ``"initial"`` computes them once, here, as the original does (with fresh BatchNorms -0.79788 for ever), or
            ``"live"`` at every call from the self-teacher's BatchNorms as they are then; the loss keeps a reference to
            them, not a copy. Neither waits for a device.
        label_smoothing, ignore_index: of both cross-entropies, as in `FRSKDLoss`.

    Attributes:
        linear: the adapters; parameters are called ``linear.{l}.0.weight`` (convolution), ``linear.{l}.1.*`` (BatchNorm).
        margin1, ..., marginL: buffers (1, C_l, 1, 1), the margins that are used, or were used last.
        needs_preact: True: features come from before their last ReLU (``backbone(images, preact=True)``).

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import OverhaulLoss
        >>> from frskd_fast.models import BiFPNc, wrn16x2
        >>> backbone = wrn16x2(num_classes=10)
        >>> self_teacher = BiFPNc(backbone.channels, 10)
        >>> criterion = OverhaulLoss(backbone.channels, self_teacher)
        >>> round(criterion.margin1[0, 0].item(), 5)
        -0.79788
        >>> features, logits = backbone(torch.randn(2, 3, 16, 16), preact=True)
        >>> teacher_features, teacher_logits = self_teacher(features, preact=True)
        >>> criterion(logits, teacher_logits, features, teacher_features, torch.tensor([0, 1])).backward()

    Source: the feature loss "od" of FRSKD's released code (Ji et al., CVPR 2021), after Heo et al., ICCV 2019, eq. 2 to 5.
    """

    needs_preact = True
    shown = (*HintLoss.shown, "margins")

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher: nn.Module | Sequence[int],
        alpha: float = 2.0,
        beta: float = 1e-3,
        temperature: float = 4.0,
        impl: str = "auto",
        *,
        margins: str = "initial",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        if margins not in MARGINS:
            raise ValueError(f"margins is {margins!r}, but 'initial' or 'live' was wanted.")
        batch_norms: tuple[nn.Module, ...] = ()
        channels: Any = teacher
        if isinstance(teacher, nn.Module):
            batch_norms = _last_batch_norms(teacher)
            channels = [cast(Tensor, batch_norm.weight).shape[0] for batch_norm in batch_norms]
        elif margins == "live":
            raise TypeError(
                f"teacher is {teacher!r}, but margins='live' needs the self-teacher itself, whose BatchNorms it reads."
            )
        super().__init__(
            student_channels,
            channels,
            alpha,
            beta,
            temperature,
            impl,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        self.margins = margins
        # In a tuple, so that the self-teacher's parameters do not become the loss's own.
        self.teacher_modules = batch_norms if margins == "live" else ()
        sources = batch_norms or [nn.BatchNorm2d(count) for count in channels]
        for level, batch_norm in enumerate(sources):
            margin = _margin(batch_norm, torch.float64).to(torch.get_default_dtype())
            self.register_buffer(f"margin{level + 1}", margin)

    @classmethod
    def for_networks(cls, student_channels: Sequence[int], self_teacher: nn.Module, **settings: Any) -> Self:
        """The loss with adapters from these channels to those of `self_teacher`'s BatchNorms, and their margins."""
        return cls(student_channels, self_teacher, **settings)

    def distance(self, adapted: list[Tensor], teachers: list[Tensor], plain: bool) -> Tensor:
        """sum_l OD_l / 2^(L-1-l)."""
        levels = len(adapted)
        margins = self._current_margins(accumulate_dtype(adapted[0].dtype))
        shares = [2.0 ** (level + 1 - levels) for level in range(levels)]
        if plain:
            triples = zip(adapted, teachers, margins, strict=True)
            distances = [reference.overhaul_distance(s, t, margin) for s, t, margin in triples]
            return torch.stack([d * share for d, share in zip(distances, shares, strict=True)]).sum()
        weights = tuple(share / adapted[0].shape[0] for share in shares)
        return feature_distance(weights, True, adapted, teachers, margins)

    @torch.no_grad()
    def _current_margins(self, dtype: torch.dtype) -> list[Tensor]:
        buffers = [self.get_buffer(f"margin{level + 1}") for level in range(len(self.linear))]
        for buffer, batch_norm in zip(buffers, self.teacher_modules, strict=False):
            buffer.copy_(_margin(batch_norm, dtype))
        return [buffer.to(dtype) for buffer in buffers]


@torch.no_grad()
def _margin(batch_norm: nn.Module, dtype: torch.dtype) -> Tensor:
    weight, bias = cast(Tensor, batch_norm.weight), cast(Tensor, batch_norm.bias)
    return reference.overhaul_margin(weight.to(dtype), bias.to(dtype)).view(1, -1, 1, 1)


def _last_batch_norms(teacher: nn.Module) -> tuple[nn.Module, ...]:
    if not hasattr(teacher, "get_bn_before_relu"):
        raise TypeError(
            f"teacher is a {type(teacher).__name__} without get_bn_before_relu(), but the BatchNorms that make its maps were "
            "wanted; give it that method, or pass the channels of its maps."
        )
    batch_norms = tuple(cast(Any, teacher).get_bn_before_relu())
    for level, batch_norm in enumerate(batch_norms):
        if not isinstance(getattr(batch_norm, "weight", None), Tensor) or batch_norm.bias is None:
            raise TypeError(
                f"teacher.get_bn_before_relu()[{level}] is {batch_norm!r}, but a BatchNorm with weight and bias was wanted."
            )
    return batch_norms


def _checked_channels(channels: Any, name: str) -> list[int]:
    if not isinstance(channels, list | tuple) or not all(isinstance(count, int) for count in channels):
        raise TypeError(f"{name} is {channels!r}, but a list of channel counts, finest level first, was wanted.")
    if not channels or min(channels) < 1:
        raise ValueError(f"{name} is {list(channels)}, but at least one level, each of 1 channel or more, was wanted.")
    return list(channels)
