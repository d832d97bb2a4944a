"""Ten SGD steps of HSAKD's three systems in float64 against the original: networks, heads, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from trajectory_utils import assert_final, filled, follow, warmed_up

from frskd_fast._dispatch import use_impl
from frskd_fast.mixing import rotate4
from frskd_fast.models import create_model, resnet8, resnet14
from frskd_fast.tasks import HSAKDOnlineTask, HSAKDTask, HSAKDTeacherTask

# On a CPU with the extension, "auto" is "cpu".
RUNS = pytest.mark.parametrize(("impl", "steps"), [("reference", 2), ("auto", None)])


def teacher() -> nn.Module:
    return create_model("resnet20_aux", 10)


@RUNS
def test_teacher(impl: str, steps: int | None) -> None:
    task = filled(HSAKDTeacherTask(resnet14(num_classes=10)))
    with use_impl(impl):
        stored = follow(
            "trajectory_hsakd_teacher",
            task,
            lambda parts: [parts[name] for name in ("loss", "ce", *(f"auxiliary_ce_{head}" for head in (1, 2, 3)))],
            steps,
        )
    if stored is None:
        return
    _compare(task.eval(), stored)


@RUNS
def test_student(impl: str, steps: int | None) -> None:
    case = "trajectory_hsakd_student"
    task = HSAKDTask(filled(create_model("resnet8_aux", 10)), warmed_up(teacher, case))
    with use_impl(impl):
        stored = follow(
            case,
            task,
            lambda parts: [
                parts[name] for name in ("loss", "ce", "kd", *(f"auxiliary_kd_{head}" for head in (1, 2, 3)))
            ],
            steps,
        )
    if stored is None:
        return
    _compare(task.eval(), stored)
    with torch.no_grad():
        assert_final(task.teacher(stored["images"].double())[0], stored["teacher_eval_logits"])


@RUNS
def test_online_pair(impl: str, steps: int | None) -> None:
    task = filled(HSAKDOnlineTask(resnet8(num_classes=10)))

    def columns(parts: dict[str, Tensor]) -> list[Tensor]:
        terms = ("ce", "auxiliary_ce", "kd", "auxiliary_kd")
        nets = [{name.removeprefix(net): value for name, value in parts.items()} for net in ("net1_", "net2_")]
        names = {term: [term] if term in ("ce", "kd") else [f"{term}_{head}" for head in (1, 2, 3)] for term in terms}
        return [parts["loss"], *(sum(net[name] for net in nets for name in names[term]) for term in terms)]

    with use_impl(impl):
        stored = follow("trajectory_hsakd_online", task, columns, steps)
    if stored is None:
        return
    for index, student in enumerate(task.eval().students().values()):
        with torch.no_grad():
            assert_final(student(stored["images"].double()), stored[f"final_eval_logits.{index}"])


@torch.no_grad()
def _compare(task: HSAKDTeacherTask | HSAKDTask, stored: dict[str, Tensor]) -> None:
    images = stored["images"].double()
    logits, auxiliary = task.net(images)
    for value, name in zip((logits, *auxiliary), ("logits", *(f"aux_logits.{head}" for head in range(3))), strict=True):
        assert_final(value, stored[f"final_eval_{name}"])
    assert torch.equal(task(images)["output"], logits) and torch.equal(task.student()(images), logits)
    assert task.evaluate(images, stored["targets"])["rotation_class_accuracy"] == (
        (task.net(rotate4(images))[0].argmax(1) == stored["targets"].repeat_interleave(4)).float().mean()
    )
