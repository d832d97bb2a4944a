"""Targets of class logits: what a caller passed, checked and in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast.ops import _checks
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import check_label_range

# What ignored labels become where labels of images are made into others: no joint label is negative.
IGNORED = -100

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def kept(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of one made under ``inference_mode`` (a frozen teacher's), which autograd refuses to keep."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


class Labels(NamedTuple):
    """Targets of every head: class indices or probabilities, and the second indices of a two-label mix."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    mix: float

    def kept(self) -> Labels:
        """The same labels, as tensors that autograd keeps."""
        return Labels(tuple(map(kept, self.first)), tuple(map(kept, self.second)), self.mix)


def class_indices(target: Any, logits: Tensor, name: str, wanted: str | None = None) -> Tensor:
    """`target` as int64; raises unless it holds one index for each row of the logits.

    `wanted` is what the errors say was; None are class indices or probabilities.
    """
    wanted = wanted or f"class indices (int64) or probabilities of shape {tuple(logits.shape)}"
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} is a {type(target).__name__}, but {wanted} were wanted.")
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name} has dtype {target.dtype}, but {wanted} were wanted; cast labels with .long().")
    shape = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(target.shape)}, but one class index for each row, shape {shape}, was wanted."
        )
    if target.device != logits.device:
        raise ValueError(
            f"{name} is on {target.device}, but the logits are on {logits.device}; move it with .to({str(logits.device)!r})."
        )
    return target if target.dtype == torch.int64 else target.long()


def is_mix(targets: Any) -> bool:
    """Whether ``targets`` are two-label targets (targets_a, targets_b, lam), and not three heads' targets."""
    return (
        isinstance(targets, tuple | list)
        and len(targets) == 3
        and isinstance(targets[0], Tensor)
        and isinstance(targets[1], Tensor)
        and not (isinstance(targets[2], Tensor) and targets[2].dim() > 0)
    )


def checked_labels(
    targets: Any, students: Sequence[Tensor], several: bool, ignore_index: int, check_range: bool
) -> Labels:
    """Targets of every head in the raw contract's form."""
    heads = len(students)
    if targets is None:
        return Labels((), (), 1.0)
    mix = 1.0
    seconds: Any = None
    if is_mix(targets):
        firsts, seconds, mix = targets[0], targets[1], _checks.unit_interval(targets[2], "targets[2] (lam)")
        firsts, seconds = (firsts,) * heads, (seconds,) * heads
        names = ["targets[0]"] * heads
    elif isinstance(targets, Tensor):
        firsts = (targets,) * heads
        names = ["targets"] * heads
    elif several and isinstance(targets, tuple | list) and len(targets) == heads:
        firsts = tuple(targets)
        names = [f"targets[{head}]" for head in range(heads)]
    else:
        raise TypeError(
            f"targets is a {type(targets).__name__}, but class indices, a tuple (targets_a, targets_b, lam), or "
            "probabilities of the logits' shape were wanted."
        )
    first: list[Tensor] = []
    second: list[Tensor] = []
    floating: set[bool] = set()
    for head, logits in enumerate(students):
        target = firsts[head]
        if not isinstance(target, Tensor):
            raise TypeError(f"{names[head]} is a {type(target).__name__}, but a torch.Tensor was wanted.")
        floating.add(target.dtype.is_floating_point)
        if target.dtype.is_floating_point and seconds is None:
            first.append(_probabilities(target, logits, names[head]))
            continue
        first.append(class_indices(target, logits, names[head]))
        if check_range:
            check_label_range(first[-1], logits.shape[1], ignore_index, names[head])
        if seconds is not None:
            second.append(class_indices(seconds[head], logits, "targets[1]"))
            if check_range:
                check_label_range(second[-1], logits.shape[1], ignore_index, "targets[1]")
    if len(floating) > 1:
        raise TypeError("targets mix class indices and probabilities over the heads, but one kind was wanted.")
    return Labels(tuple(first), tuple(second), mix)


def _probabilities(target: Tensor, logits: Tensor, name: str) -> Tensor:
    if target.shape != logits.shape:
        raise ValueError(
            f"{name} has dtype {target.dtype} and shape {tuple(target.shape)}, but probabilities need the logits' shape "
            f"{tuple(logits.shape)}; class indices need dtype int64."
        )
    if target.device != logits.device:
        raise ValueError(
            f"{name} is on {target.device}, but the logits are on {logits.device}; move it with .to({str(logits.device)!r})."
        )
    if target.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to class probabilities; pass {name}.detach().")
    return target.to(accumulate_dtype(logits.dtype))


def mixed_probabilities(
    targets: Sequence[Any], logits: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Probabilities t (N, K) whose cross-entropy is that of the two-label targets, ignored labels and smoothing included.

    With w_n = sum_k t_nk the weight of row n (below 1 where a label is ignored), the two-label mean divides by sum_n w_n
    and the mean over probabilities by N; the difference goes into t.
    """
    classes = logits.shape[1]
    first, second, mix = targets
    first, second = class_indices(first, logits, "targets[0]"), class_indices(second, logits, "targets[1]")
    check_label_range(first, classes, ignore_index, "targets[0]")
    check_label_range(second, classes, ignore_index, "targets[1]")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    positions = torch.arange(classes, device=logits.device)

    def one_hot(labels: Tensor) -> Tensor:
        # As everywhere on a device, where reading them would synchronise, labels that are no class give NaN.
        counts = labels != ignore_index
        wrong = counts & ((labels < 0) | (labels >= classes))
        ones = (labels.unsqueeze(1) == positions) & counts.unsqueeze(1)
        return ones.to(dtype).masked_fill(wrong.unsqueeze(1), float("nan"))

    probabilities: Tensor = mix * one_hot(first) + (1 - mix) * one_hot(second)
    weight = probabilities.sum(1, keepdim=True)
    total = weight.sum()
    scale = torch.where(total == 0, 0.0, logits.shape[0] / total)
    if label_smoothing < 1:
        smoothed = (scale * weight - 1) * (label_smoothing / (classes * (1 - label_smoothing)))
        probabilities = scale * probabilities + smoothed
    return probabilities.to(dtype)
