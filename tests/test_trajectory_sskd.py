"""Ten SGD steps of SSKD's two stages in float64 against the original: networks, heads, ranking, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from trajectory_utils import assert_final, filled, follow, warmed_up

from frskd_fast._dispatch import use_impl
from frskd_fast.mixing import rotate4
from frskd_fast.models import ProjectionHead, resnet8, resnet8x4
from frskd_fast.tasks import SSKDHeadTask, SSKDTask

# On a CPU with the extension, "auto" is "cpu".
RUNS = pytest.mark.parametrize(("impl", "steps"), [("reference", 2), ("auto", None)])


def teacher() -> ProjectionHead:
    return ProjectionHead(resnet8x4(num_classes=10))


@RUNS
def test_projection_head(impl: str, steps: int | None) -> None:
    case = "trajectory_sskd_head"
    task = SSKDHeadTask(warmed_up(teacher, case))
    with use_impl(impl):
        stored = follow(case, task, lambda parts: [parts["loss"]], steps)
    if stored is None:
        return
    images = stored["images"].double()
    with torch.no_grad():
        logits, projections, _ = task.net(images)
        assert_final(projections, stored["final_proj"])
        assert_final(logits, stored["logits"])
        measured = task.eval().evaluate(images, stored["targets"])
        parts = task.loss(task.net(rotate4(images))[1], return_parts=True)
    assert list(measured) == ["output", "pretext_accuracy"] and torch.equal(measured["output"], logits)
    assert measured["pretext_accuracy"] == parts.accuracy


@RUNS
def test_student(impl: str, steps: int | None) -> None:
    case = "trajectory_sskd_student"
    task = SSKDTask(filled(ProjectionHead(resnet8(num_classes=10))), warmed_up(teacher, case))
    columns = ("loss", "ce", "kd", "transformed", "similarity")
    with use_impl(impl):
        stored = follow(case, task, lambda parts: [parts[name] for name in columns], steps)
    if stored is None:
        return
    images = stored["images"].double()
    with torch.no_grad():
        assert_final(task.eval().student()(images), stored["final_eval_logits"])
        assert_final(task.teacher(images)[0], stored["teacher_eval_logits"])
