"""The three-way rule: our error against float64 may not pass that of plain PyTorch in the same dtype, plus a small floor."""

from __future__ import annotations

import torch
from torch import Tensor

# Floors in units of the dtype's rounding step, relative to the largest true value: what a different order of summation costs.
_FLOOR_STEPS = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth|, with NaN and infinity counted as infinite."""
    if truth.numel() == 0:
        return 0.0
    difference = (value.detach().double() - truth.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def assert_close(ours: Tensor, plain: Tensor, truth: Tensor, label: str, scale: float = 0.0) -> None:
    """Raise unless max |ours - truth| <= max |plain - truth| + floor.

    The floor is a few rounding steps of the result, relative to the largest true value, and of the arithmetic (float32 for
    half precision), relative to ``scale`` where the value is a difference of terms that large.

    ``plain`` is the same formula in PyTorch in the dtype under test; a plain result that is itself NaN or infinite bounds
    nothing, so the floor alone remains.
    """
    assert ours.shape == truth.shape, f"{label}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    largest = float(truth.detach().double().abs().max())
    arithmetic = torch.float64 if ours.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    floor = _FLOOR_STEPS[ours.dtype] * torch.finfo(ours.dtype).eps * largest + tiny
    floor += _FLOOR_STEPS[arithmetic] * torch.finfo(arithmetic).eps * scale
    plain_error = largest_error(plain, truth)
    allowed = floor + (plain_error if plain_error != float("inf") else 0.0)
    error = largest_error(ours, truth)
    if error > allowed:
        worst = int((ours.detach().double() - truth.detach().double()).abs().nan_to_num(nan=float("inf")).argmax())
        raise AssertionError(
            f"{label}: error {error:.3e} at flat index {worst} (ours {float(ours.detach().flatten()[worst]):.6e}, "
            f"true {float(truth.detach().flatten()[worst]):.6e}), plain PyTorch errs by {plain_error:.3e}, "
            f"allowed {allowed:.3e}"
        )
