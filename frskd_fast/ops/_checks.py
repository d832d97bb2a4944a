"""Argument checks whose messages name the argument, what came, what was wanted and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def finite_number(value: Any, name: str, wanted: str = "a finite number") -> float:
    """``value`` as a Python float; tensors on a GPU are refused because reading them would stop the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.device.type != "cpu":
            raise TypeError(
                f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}, but {wanted} was wanted; "
                "pass a Python float (reading a tensor from a device would synchronise)."
            )
        value = value.item()
    try:
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, but {wanted} was wanted; pass a Python number.") from None
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} is {number}, but {wanted} was wanted.")
    return number


def whole_number(value: Any, name: str) -> int:
    """``value`` as a Python int."""
    number = value if type(value) is int else finite_number(value, name, "a whole number")
    if number != int(number):
        raise ValueError(f"{name} is {number}, but a whole number was wanted.")
    return int(number)


def check_positive_integer(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1 (booleans are not integers here)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, but is {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")


def positive_number(value: Any, name: str) -> float:
    """``value`` as a Python float greater than 0."""
    if type(value) is float and 0.0 < value < math.inf:
        return value
    number = finite_number(value, name, "a finite number greater than 0")
    if number <= 0.0:
        raise ValueError(f"{name} is {number}, but a number greater than 0 was wanted.")
    return number


def unit_interval(value: Any, name: str) -> float:
    """``value`` as a Python float in [0, 1]."""
    if type(value) is float and 0.0 <= value <= 1.0:
        return value
    number = finite_number(value, name, "a number between 0 and 1")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number}, but a number between 0 and 1 was wanted.")
    return number


def attention_exponent(value: Any) -> float:
    """The exponent p of an attention map as a Python float >= 1."""
    number = finite_number(value, "exponent", "a finite number of at least 1")
    if number < 1.0:
        raise ValueError(
            f"exponent is {number}, but at least 1 was wanted: below 1 the gradient is infinite where a feature is 0."
        )
    return number


def floating_tensor(value: Any, name: str) -> Tensor:
    """``value`` if it is a dense floating tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but a torch.Tensor was wanted.")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} has dtype {value.dtype}, but float32, bfloat16, float16 or float64 was wanted; cast it with .float()."
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}, but a dense tensor was wanted; call .to_dense().")
    return value


def same(first: Tensor, first_name: str, second: Tensor, second_name: str) -> None:
    """Raise unless both tensors have one dtype and one device."""
    if first.dtype != second.dtype:
        raise TypeError(
            f"{second_name} has dtype {second.dtype}, but {first_name} has {first.dtype} and one dtype was wanted; "
            f"cast one of them with .to({first.dtype})."
        )
    if first.device != second.device:
        raise ValueError(
            f"{second_name} is on {second.device}, but {first_name} is on {first.device} and one device was wanted; "
            f"move one of them with .to({str(first.device)!r})."
        )


def feature_list(value: Any, name: str) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Feature maps from a tensor, a sequence or a mapping (values in insertion order), and the mapping's keys."""
    if isinstance(value, Tensor):
        return (value,), None
    if isinstance(value, Mapping):
        return tuple(value.values()), tuple(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value), None
    raise TypeError(
        f"{name} is a {type(value).__name__}, but a list, tuple or dict of feature maps of shape (N, C, H, W) was wanted."
    )


def feature_map(value: Any, name: str) -> Tensor:
    """``value`` if it is a floating (N, C, H, W) tensor with at least one channel and one pixel."""
    feature = floating_tensor(value, name)
    shape = feature.shape
    if len(shape) != 4:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, but (N, C, H, W) was wanted; "
            "tokens of shape (N, L, C) become a map by .transpose(1, 2).unflatten(2, (H, W))."
        )
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name} has shape {tuple(shape)}, but at least one channel and one pixel were wanted.")
    return feature


def feature_pyramids(
    student_feats: Any, teacher_feats: Any, names: tuple[str, str] = ("student_feats", "teacher_feats")
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two pyramids with the same number of levels, batch, dtype and device; sizes are compared by the caller."""
    student_name, teacher_name = names
    students, student_keys = feature_list(student_feats, student_name)
    teachers, teacher_keys = feature_list(teacher_feats, teacher_name)
    if len(students) != len(teachers):
        raise ValueError(
            f"{teacher_name} has {len(teachers)} levels, but {student_name} has {len(students)} and the same number was "
            "wanted; pass the levels to be compared, in the same order."
        )
    if len(students) == 0:
        raise ValueError(f"{student_name} is empty, but at least one feature map of shape (N, C, H, W) was wanted.")
    if student_keys is not None and teacher_keys is not None and student_keys != teacher_keys:
        raise ValueError(
            f"{teacher_name} has the keys {list(teacher_keys)}, but {student_name} has {list(student_keys)} and the same "
            "keys in the same order were wanted."
        )
    first_name = f"{student_name}[0]"
    first = feature_map(students[0], first_name)
    batch = first.shape[0]
    for side, features in ((student_name, students), (teacher_name, teachers)):
        for level, value in enumerate(features):
            name = f"{side}[{level}]"
            feature = feature_map(value, name)
            if feature.dtype is not first.dtype or feature.device != first.device:
                same(first, first_name, feature, name)
            if feature.shape[0] != batch:
                raise ValueError(
                    f"{name} has batch size {feature.shape[0]}, but {first_name} has {batch} and one batch size was "
                    "wanted."
                )
    return students, teachers
