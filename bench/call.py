"""One implementation of a case bound to its operands, ready to be checked and timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import DTYPES, Case, Operands

UPSTREAM_SEED = 11  # of the random gradient that a case with a map for its result starts from


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` applied to a tensor or to each one of a sequence."""
    if isinstance(value, Tensor):
        return function(value)
    return [function(tensor) for tensor in value]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an operand; the parameters of a module."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, Tensor) else list(value)


def memory_format_of(layout: str, tensor: Tensor) -> torch.memory_format:
    """channels_last for maps where the layout says so."""
    return torch.channels_last if layout == "channels_last" and tensor.dim() == 4 else torch.contiguous_format


def place(operands: Operands, case: Case, dtype: torch.dtype, device: str) -> Operands:
    """Operands as fresh tensors in `dtype`, the case's layout and on `device`; the differentiated ones require grad.

    Parameters and modules are given at least float32.
    """
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.detach().to(device).clone(memory_format=memory_format_of(case.layout, tensor))

    placed = {}
    for name, value in operands.items():
        if isinstance(value, nn.Module):
            module = copy.deepcopy(value).to(device, parameter_dtype)
            for parameter in module.parameters():
                parameter.data = parameter.data.contiguous(memory_format=memory_format_of(case.layout, parameter))
            placed[name] = module
        else:
            wanted = parameter_dtype if name in case.parameters else dtype
            placed[name] = map_tensors(partial(convert, dtype=wanted), value)
        for tensor in tensors_in(placed[name]):
            tensor.requires_grad_(case.backward and name in case.differentiated)
    return placed


class Call:
    """One implementation bound to its operands; calling it runs forward and, where the case asks for it, backward."""

    def __init__(self, case: Case, function: Callable[..., Tensor], operands: Operands) -> None:
        self.case = case
        self.function = function
        self.operands = operands
        # the tensors whose gradient the case asks for
        differentiated = case.differentiated if case.backward else ()
        self.leaves = [tensor for name in differentiated for tensor in tensors_in(operands[name])]
        self._upstream: dict[torch.dtype, Tensor] = {}

    def upstream(self, result: Tensor) -> Tensor:
        """The gradient that backward starts from: a constant for a loss, for a map always the same noise.

        The noise is rounded to the case's dtype, so that the truth in float64 starts from the same numbers. It is of
        the size of one and needs no scale of the loss.
        """
        found = self._upstream.get(result.dtype)
        if found is None:
            if result.dim() == 0:
                found = torch.full_like(result, self.case.upstream)
            else:
                generator = torch.Generator().manual_seed(UPSTREAM_SEED)
                noise = torch.randn(result.shape, generator=generator).to(DTYPES[self.case.dtype])
                noise = noise.to(result.device, result.dtype)
                found = noise.contiguous(memory_format=memory_format_of(self.case.layout, result))
            self._upstream[result.dtype] = found
        return found

    def drop_gradients(self) -> None:
        """Free the gradients of the previous run, so that backward writes instead of adding."""
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> Tensor:
        """The result, with a graph for backward where the case asks for it."""
        with torch.set_grad_enabled(self.case.backward):
            return self.function(**self.operands)

    def __call__(self) -> Tensor:
        result = self.forward()
        if self.case.backward:
            torch.autograd.backward(result, self.upstream(result))
        return result.detach()
