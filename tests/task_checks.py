"""What is asked of every task: steps by hand, kept outputs, copies, autocast, shards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def check_step(task: Any, hand: Any, targets: Any, images: Tensor, by_hand: Callable[..., Any]) -> None:
    """Dict and gradients are, to the bit, those of `by_hand(hand, images, targets)`, the loss and the rest of the dict."""
    got, (wanted, others) = task(images, targets), by_hand(hand, images, targets)
    assert got.keys() == {"loss", *others} and torch.equal(got["loss"], wanted)
    for key, value in others.items():
        assert torch.equal(got[key], value), key
        assert key.endswith("output") or (value.dim() == 0 and not got[key].requires_grad)
    task.zero_grad()
    hand.zero_grad()
    got["loss"].backward()
    wanted.backward()
    for (key, parameter), other in zip(task.named_parameters(), hand.parameters(), strict=True):
        assert (parameter.grad is None) == (not parameter.requires_grad), key
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), key


def check_kept_outputs(task: Any, teacher: Any, images: Tensor, labels: Tensor, names: list[str]) -> None:
    """The outputs `names` take the place of the frozen `teacher`, in any order and in half precision."""
    outputs = task.teacher_outputs(images)
    assert list(outputs) == names and not any(output.requires_grad for output in outputs.values())
    assert all(len(output) == len(images) for output in outputs.values())
    wanted = copy.deepcopy(task)(images, labels)
    teacher.network.forward = None
    got = task(images, labels, teacher_outputs=dict(reversed(outputs.items())))
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    halves = {key: output.half() for key, output in outputs.items()}
    torch.testing.assert_close(task(images, labels, halves)["loss"], wanted["loss"], rtol=2e-2, atol=0)


def check_copies(task: Any, images: Tensor, labels: Tensor, stranger: Any, layer: str = "backbone.fc") -> None:
    """A copy with zeros in `layer` and the task's state, a pickle and a float64 copy have its loss; a `stranger`, whose frozen
    teacher is another, refuses the state."""
    state = task.state_dict()
    wanted = copy.deepcopy(task)(images, labels)["loss"]
    again = copy.deepcopy(task)
    nn.init.zeros_(again.get_parameter(f"{layer}.weight"))
    again.load_state_dict(state)
    for same in (again, pickle.loads(pickle.dumps(task))):
        assert torch.equal(same(images, labels)["loss"], wanted)
    if stranger is not None:
        with pytest.raises(RuntimeError, match="build the task with the teacher that it was trained with"):
            stranger.load_state_dict(state)
    double = copy.deepcopy(task).double()
    torch.testing.assert_close(double(images.double(), labels)["loss"].float(), wanted)


def check_autocast(task: Any, images: Tensor, labels: Tensor, lr: float = 0.1) -> None:
    """A step in bfloat16 with a scaler: no step is lost, and the loss is near that in float32."""
    wanted = copy.deepcopy(task)(images, labels)["loss"]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=lr)
    before = [parameter.clone() for group in optimiser.param_groups for parameter in group["params"]]
    with torch.autocast("cpu", torch.bfloat16):
        parts = task(images, labels)
    assert parts["output"].dtype == torch.bfloat16 and parts["loss"].dtype == torch.float32
    torch.testing.assert_close(parts["loss"], wanted, rtol=0.1, atol=0)
    scaler.scale(parts["loss"]).backward()
    scaler.step(optimiser)
    scaler.update()
    after = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert scaler.get_scale() == 64.0 and all(parameter.isfinite().all() for parameter in task.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def check_sharded(tasks: Iterable[Any], images: Tensor, labels: Tensor, plain_images: Tensor, folder: Path) -> None:
    """FSDP2 in a group of one, whose parameters are sharded all the same: gradients, metrics and students of plain tasks."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for plain in tasks:
            task = copy.deepcopy(plain)
            for network in [*task.networks(), task]:
                fully_shard(network, mesh=mesh)
            for each in (task, plain):
                each(images, labels)["loss"].backward()
            for (key, ours), theirs in zip(task.named_parameters(), plain.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), key
                if ours.grad is not None:
                    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, msg=key)
            measured, wanted = (each.eval().evaluate(plain_images, labels) for each in (task, plain))
            torch.testing.assert_close(measured, wanted)
            torch.testing.assert_close(task.student()(plain_images), plain.student()(plain_images))
    finally:
        torch.distributed.destroy_process_group()
