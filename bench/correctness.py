"""Whether a result is right: errors against float64, and what an implementation may err beyond eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.call import Call, place, tensors_in
from bench.case import DTYPES, Case, Operands

# What an implementation may err beyond eager PyTorch, relative to the largest true value: the loss is accumulated in
# float32; a gradient is accumulated in float32 and rounded once to its dtype.
LOSS_FLOOR = 16 * torch.finfo(torch.float32).eps
# Through many layers two right results differ by luck: a rounding moves a value across the kink of a ReLU, and its whole
# term leaves the gradient. So a chain's gradients are compared as one vector, and this many times eager's error passes.
# What that would let through shows in float64, where both must agree to EXACT.
CHAIN_SLACK = 4.0
EXACT = 1e-8


@dataclass(frozen=True)
class Errors:
    """Errors against float64: of the loss (or the map that the case computes), and of each gradient."""

    loss: float
    gradients: tuple[float, ...]

    @property
    def gradient(self) -> float | None:
        """The worst gradient; NaN if one is; None when there are none."""
        if not self.gradients:
            return None
        return math.nan if any(map(math.isnan, self.gradients)) else max(self.gradients)

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return not any(map(math.isnan, (self.loss, *self.gradients)))


def truth(case: Case, operands: Operands) -> tuple[Tensor, list[Tensor]]:
    """The formula in float64 on the rounded operands: (loss, gradients)."""
    device = str(tensors_in(next(iter(operands.values())))[0].device)
    call = Call(case, case.original, place(operands, case, torch.float64, device))
    loss = call()
    return loss, [leaf.grad for leaf in call.leaves if leaf.grad is not None]


def largest(exact: Tensor) -> float:
    """max |exact|, what errors are relative to; 1 where all is zero."""
    return (exact.abs().max().item() if exact.numel() else 0.0) or 1.0


def relative_error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact| / max |exact|; NaN when anything is not finite."""
    if exact.numel() == 0:
        return 0.0
    difference = (value.double() - exact).abs().max().item()
    return difference / largest(exact) if math.isfinite(difference) else math.nan


def vector_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||value - exact|| / ||exact|| of all the tensors together; NaN when anything is not finite."""
    difference = math.sqrt(
        sum((value.double() - true).square().sum().item() for value, true in zip(values, exact, strict=True))
    )
    length = math.sqrt(sum(true.square().sum().item() for true in exact)) or 1.0
    return difference / length if math.isfinite(difference) else math.nan


def gradient_floor(dtype: str, exact: Tensor) -> float:
    """One rounding to `dtype` (at least 16 of float32's); half a subnormal step where the numbers are that small."""
    information = torch.finfo(DTYPES[dtype])
    return max(LOSS_FLOOR, information.eps, 0.5 * information.smallest_normal * information.eps / largest(exact))


def result_floor(case: Case, exact: Tensor) -> float:
    """What the result may err: a loss is float32 whatever the inputs are; a map, or a network's logits, are rounded."""
    return LOSS_FLOOR if exact.dim() == 0 and not case.chain else gradient_floor(case.dtype, exact)


def gradient_floors(case: Case, exact_gradients: Sequence[Tensor]) -> list[float]:
    """What each gradient may err beyond eager's; a chain's are one vector."""
    floors = [gradient_floor(case.dtype, gradient) for gradient in exact_gradients]
    return [max(floors)] if case.chain else floors


def errors_of(call: Call, exact_loss: Tensor, exact_gradients: Sequence[Tensor]) -> Errors:
    """Run `call` once and compare it with the truth."""
    call.drop_gradients()
    loss = call()
    found = []
    for index, leaf in enumerate(call.leaves):
        if leaf.grad is None:
            raise ValueError(f"the differentiated tensor number {index} got no gradient.")
        found.append(leaf.grad)
    if call.case.chain:
        gradients = [vector_error(found, exact_gradients)]
    else:
        gradients = [relative_error(gradient, exact) for gradient, exact in zip(found, exact_gradients, strict=True)]
    call.drop_gradients()
    return Errors(relative_error(loss, exact_loss), tuple(gradients))


def within(
    errors: Errors,
    eager: Errors,
    gradient_floors: Sequence[float],
    floor_of_result: float = LOSS_FLOOR,
    slack: float = 1.0,
) -> bool:
    """The three-way rule: no error above `slack` times eager's in the same dtype plus the floor.

    The floor alone where eager is NaN.
    """

    def allowed(baseline: float, floor: float) -> float:
        return floor if math.isnan(baseline) else slack * baseline + floor

    if not errors.finite or errors.loss > allowed(eager.loss, floor_of_result):
        return False
    pairs = zip(errors.gradients, eager.gradients, gradient_floors, strict=True)
    return all(error <= allowed(baseline, floor) for error, baseline, floor in pairs)


def agrees_in_float64(case: Case, function: Callable[..., Tensor], device: str) -> bool:
    """Whether `function` in float64 gives the truth on the tiny operands, where roundings decide nothing."""
    operands = place(case.tiny(), case, torch.float64, device)
    errors = errors_of(Call(case, function, operands), *truth(case, operands))
    return errors.finite and max(errors.loss, errors.gradient or 0.0) < EXACT


class Judge:
    """Knows what a case's operands truly give and what eager PyTorch errs on them, and so which errors pass."""

    def __init__(self, case: Case, operands: Operands, exact: tuple[Tensor, list[Tensor]] | None = None) -> None:
        self.case = case
        self.exact = exact or truth(case, operands)
        self.eager = errors_of(Call(case, case.original, operands), *self.exact)

    def errors(self, call: Call) -> Errors:
        """Run `call` once and compare it with the truth."""
        return errors_of(call, *self.exact)

    def right(self, errors: Errors) -> bool:
        """The three-way rule, with the slack that a chain of layers needs."""
        exact_loss, exact_gradients = self.exact
        slack = CHAIN_SLACK if self.case.chain else 1.0
        floors = gradient_floors(self.case, exact_gradients)
        return within(errors, self.eager, floors, result_floor(self.case, exact_loss), slack)
