"""A guard against terms of a loss that do nothing: features that no gradient goes back through, hooks that no longer run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast.losses.base import Loss

from .base import Task


class ZeroTermError(RuntimeError):
    """A term of the loss, or the gradient of a module, was exactly zero in all of the first steps."""


class Guard:
    """Raises where, in every one of the first steps, a term was exactly 0 or no gradient reached a module that trains.

    Three things are looked at, in the first steps alone:

    * The scalars that the task returns: none may be exactly zero in all of the steps, but those in `task.may_be_zero` (terms
      of weight 0 or that grow later) and accuracies.
    * The gradients of each module of the task that trains: the student's network and other networks as a whole, heads around
      the student's network and adapters in a loss or a list by their modules. At least one number of each must not be zero in
      one of the steps. Where the task has terms that may be zero, only the student's network is looked at, because the
      modules of such a term may get none.
    * The student's outputs that a loss is given, in the first step: they must require gradients. Arguments of a
      `losses.base.Loss` whose names begin with "student" are looked at, unless the task or the loss is compiled or a part of
      the backbone is frozen.

    What is found stays on the device; it is read once, after the last of the steps. So a step costs a few small kernels
    three times, and nothing after that. With several processes, all of them have to call; what is zero in one of them alone
    is no error.

    Args:
        task: whose steps they are.
        steps: how many optimiser steps are looked at.

    Attributes:
        done: whether the first steps are over.

    Raises:
        ZeroTermError: by `after_backward`, a sentence that names the term or the module.

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import ClassificationTask
        >>> task = ClassificationTask(wrn16x2(num_classes=10))
        >>> guard = Guard(task, steps=1)
        >>> parts = task(torch.randn(2, 3, 8, 8), torch.tensor([3, 1]))
        >>> try:
        ...     guard.after_backward(parts)  # without a backward before it
        ... except ZeroTermError as error:
        ...     print(str(error)[:67])
        No gradient reached backbone of ClassificationTask in the first ste
    """

    def __init__(self, task: Task, steps: int = 3) -> None:
        self.task = task
        self.steps = self.left = steps
        self._device = next(task.parameters()).device
        self._never = torch.zeros((), dtype=torch.bool, device=self._device)
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._detached: list[str] = []
        whole = all(parameter.requires_grad for parameter in task.backbone.parameters())
        losses = list(_losses_not_compiled(task)) if whole else []
        self._hooks = [loss.register_forward_pre_hook(self._see_arguments, with_kwargs=True) for loss in losses]

    @property
    def done(self) -> bool:
        return self.left <= 0

    def after_backward(self, parts: Mapping[str, Any]) -> None:
        """For a training loop of your own: call it in each step between `backward()` and `optimizer.step()`.

        Args:
            parts: what the task returned.
        """
        self.see_terms(parts)
        self.see_gradients()
        self.end_step()

    def close(self) -> None:
        """Take away the hooks of the losses, which the first batch does as well."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def see_terms(self, parts: Mapping[str, Any]) -> None:
        """Look at the scalars of one batch."""
        self.close()
        if self._detached:
            raise ZeroTermError(
                f"{', '.join(self._detached)} requires no gradient, so the loss does not teach the student by it: it was "
                "detached, or computed without gradients. Hand the loss what the student's forward pass returns; "
                f"{_OFF}"
            )
        if self.done:
            return
        for name, value in parts.items():
            if isinstance(value, Tensor) and value.dim() == 0 and not name.endswith("accuracy"):
                self._see("term", name, (value.detach() != 0).to(self._device))

    def see_gradients(self) -> None:
        """Look at the gradients, before the optimiser's step."""
        if self.done:
            return
        for name, parameters in modules_to_reach(self.task).items():
            gradients = _gradients(parameters)
            # The largest of each tensor: squares could vanish.
            norms = torch._foreach_norm(gradients, float("inf")) if gradients else []
            flags = [(norm != 0).to(self._device) for norm in norms]
            self._see("module", name, torch.stack(flags).any() if flags else self._never)

    def end_step(self) -> None:
        """After the last of the steps: read what was seen, and raise what there is to raise."""
        self.left -= 1
        if not self.done or not self._seen:
            return
        seen, self._seen = self._seen, {}
        flags = torch.stack(list(seen.values())).int()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        dead = [key for key, flag in zip(seen, flags.tolist(), strict=True) if not flag]
        task = type(self.task).__name__
        when = "the first step" if self.steps == 1 else f"each of the first {self.steps} steps"
        terms = [name for kind, name in dead if kind == "term" and name not in self.task.may_be_zero]
        if terms:
            raise ZeroTermError(
                f"The term {', '.join(terms)} of {task} was exactly zero in {when}, so it teaches nothing. Were its features "
                "recorded by hooks that no longer run, or is its teacher a copy of the student? A term that may be zero at "
                f"first is named in the task's may_be_zero; {_OFF}"
            )
        modules = [name for kind, name in dead if kind == "module"]
        if modules:
            raise ZeroTermError(
                f"No gradient reached {', '.join(modules)} of {task} in {when}, so it does not learn. Does the loss see what "
                f"it returns, attached to the graph? Freeze it with requires_grad_(False) where that is meant; {_OFF}"
            )

    def _see(self, kind: str, name: str, flag: Tensor) -> None:
        key = kind, name
        self._seen[key] = self._seen[key] | flag if key in self._seen else flag

    def _see_arguments(self, loss: nn.Module, arguments: tuple[Any, ...], more: dict[str, Any]) -> None:
        if not self.task.training or not torch.is_grad_enabled():
            return
        bound = inspect.signature(loss.forward).bind_partial(*arguments, **more)
        for name, value in bound.arguments.items():
            if name.startswith("student"):
                attached = [(place, tensor.requires_grad) for place, tensor in _tensors(value, name)]
                self._detached += [f"{place}, given to {type(loss).__name__}," for place, one in attached if not one]


_OFF = "leave the guard out (--guard false) to train all the same."


def modules_to_reach(task: Task) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, by the module that gradients have to reach: networks as wholes, adapters one by one.

    Example:
        >>> from frskd_fast.models import wrn16x2
        >>> from frskd_fast.tasks import build_frskd
        >>> list(modules_to_reach(build_frskd(wrn16x2(num_classes=10), "fit")))
        ['backbone', 'self_teacher', 'loss.linear.0', 'loss.linear.1', 'loss.linear.2']
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in _parts(task, task.backbone, ""):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parameters and (module is task.backbone or not task.may_be_zero):
            found[name] = parameters
    return found


def _losses_not_compiled(module: nn.Module) -> Iterator[Loss[Any]]:
    """Every loss in `module` whose calls run hooks as Python: a compiled call would trace them."""
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return
    if isinstance(module, Loss):
        yield module
    for child in module.children():
        yield from _losses_not_compiled(child)


def _parts(module: nn.Module, backbone: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module that counts as one, and its name: what is beside the backbone in a network is taken apart."""
    around = _holds(module, backbone) and prefix != ""
    for name, child in module.named_children():
        if child is not backbone and (
            _holds(child, backbone) or isinstance(child, nn.ModuleList | nn.ModuleDict | Loss)
        ):
            yield from _parts(child, backbone, f"{prefix}{name}.")
        elif child is not backbone and around and any(True for _ in child.children()):
            yield from ((f"{prefix}{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield f"{prefix}{name}", child


def _holds(module: nn.Module, backbone: nn.Module) -> bool:
    return any(one is backbone for one in module.modules())


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Those that are there; of sharded ones the shard of this process."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    return [gradient for gradient in local if gradient.numel()]


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in an argument, and what to call them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in items:
            yield from _tensors(one, f"{place}[{key!r}]")
