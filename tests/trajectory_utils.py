"""Whole systems beside the stored training steps of their originals: fill, warm up, train and compare, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from golden_utils import fill_parameters, golden_settings, load_golden
from torch import Tensor, nn

from frskd_fast.mixing import rotate4
from frskd_fast.tasks import Task


def filled(module: nn.Module, offset: int = 0) -> nn.Module:
    """`module` with the formula's parameters, which were rounded to float32, in float64."""
    fill_parameters(module, offset)
    return module.double().train()


def warmed_up(build: Callable[[], nn.Module], case: str, offset: int = 0) -> nn.Module:
    """The network, filled, with the statistics that forward passes over all images of the case leave, in evaluation mode."""
    return copy.deepcopy(_warmed_up(build, case, offset))


@cache
@torch.no_grad()
def _warmed_up(build: Callable[[], nn.Module], case: str, offset: int) -> nn.Module:
    network = filled(build(), offset)
    for _ in range(golden_settings(case)["teacher_warmup"]):
        network(load_golden(case)["images"].double())
    return network.eval()


def follow(
    case: str, task: Task, columns_of: Callable[[dict[str, Tensor]], list[Tensor]], steps: int | None = None
) -> dict[str, Tensor] | None:
    """Train `task` as the case says and compare the losses of each step, at the end the sum over |p|.

    Images are rotated for a task that wants them so. `columns_of` finds the losses of the case's columns in what the task
    returned. What is stored is returned, but for a run that ends after fewer `steps`.
    """
    stored, settings = load_golden(case), golden_settings(case)
    images, targets, batch = stored["images"].double(), stored["targets"], settings["batch"]
    names = "lr", "momentum", "weight_decay", "nesterov"
    optimiser = torch.optim.SGD(task.parameter_groups(), **{name: settings[name] for name in names})
    for step in range(steps or settings["steps"]):
        begin = step * batch % len(images)
        rows = slice(begin, begin + batch)
        views = rotate4(images[rows]) if task.views == "rotations" else images[rows]
        parts = task(views, targets[rows])
        torch.testing.assert_close(
            torch.stack(columns_of(parts)).detach(),
            stored["losses"][step],
            rtol=1e-6,
            atol=1e-12,
            msg=lambda text, step=step: f"step {step}: {text}",
        )
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
    if steps is not None:
        return None
    trained = [parameter.detach().abs().sum() for group in task.parameter_groups() for parameter in group["params"]]
    torch.testing.assert_close(torch.stack(trained).sum(), stored["final_abs_param_sum"], rtol=1e-9, atol=0)
    return stored


def assert_final(value: Tensor, stored: Tensor) -> None:
    """Within 1e-6 of the largest entry."""
    torch.testing.assert_close(value, stored, rtol=0, atol=1e-6 * stored.abs().max().item())
