"""The methods in the trainer: a run of each that goes on bit for bit, in two processes, and the export of its student.

Those of FRSKD are in test_resume.py, test_distributed.py and test_export.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import NormalisedByGroups, SmallNet, epochs, process, same_weights, small_run, steps, weights

from frskd_fast.models import CIFARResNet, ProjectionHead, with_auxiliary_heads
from frskd_fast.tasks import FusedNetwork
from frskd_fast.training.cli import main
from frskd_fast.training.export import load_student, write_student


class Method(NamedTuple):
    """What a run is told, and what it logs."""

    task: str
    settings: dict[str, Any]
    terms: set[str]  # of every step
    measured: set[str]  # of every epoch
    teacher: str = ""  # the argument that names a trained network
    heads: Callable[[nn.Module], nn.Module] = nn.Identity  # what that network has besides


METHODS = {
    "hsakd": Method(
        "HSAKDTask",
        {"data__mixup": 0.0},
        {"kd", "auxiliary_kd_2"},
        {"validation/joint_accuracy_2"},
        "teacher",
        with_auxiliary_heads,
    ),
    "sskd": Method(
        "SSKDTask",
        {"data__mixup": 0.0},
        {"kd", "transformed"},
        {"train/similarity", "train/teacher_accuracy"},
        "teacher",
        ProjectionHead,
    ),
    "ffl": Method(
        "FFLTask", {"task__ramp_epochs": 2}, {"fused_kd"}, {"train/fused_kd", "validation/ensemble_accuracy"}
    ),
    "collaborative": Method(
        "CollaborativeTeachingTask",
        {"task__share_stem": True},
        {"hint", "attention_2"},
        {"train/hint", "validation/scratch_accuracy"},
        "expert",
    ),
    "adain": Method(
        "AdaINTask", {}, {"mean_1", "transfer_2"}, {"train/transfer_2", "train/teacher_accuracy"}, "teacher"
    ),
}


def settings_of(name: str, folder: Path, network: type[SmallNet]) -> dict[str, Any]:
    """Networks of a kind, of which the trained one is in a file."""
    method, called = METHODS[name], f"training_utils.{network.__name__}"
    settings = {"task": f"frskd_fast.tasks.{method.task}", "model__backbone": called, **method.settings}
    if name == "collaborative":
        settings["task__scratch"] = called
    if method.teacher:
        file = folder / "trained.pt"
        trained = network(10)
        torch.save((trained if method.heads is nn.Identity else method.heads(trained)).state_dict(), file)
        settings |= {f"task__{method.teacher}": file, f"task__{method.teacher}_name": called}
    return settings


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_bit_for_bit_and_its_student_is_exported(name: str, tmp_path: Path) -> None:
    settings = {**settings_of(name, tmp_path, SmallNet), "trainer__max_epochs": 2}
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert main(small_run(whole, **settings)) == 0
    words = small_run(folder, **settings)
    assert main([*words, "--trainer.max_steps", "6"]) == 0  # within the second epoch
    assert len(steps(folder)) == 6
    assert main(words) == 0
    assert steps(folder) == steps(whole) and epochs(folder) == epochs(whole)
    state = weights(whole)
    assert same_weights(weights(folder), state)
    assert METHODS[name].measured <= set(epochs(whole)[-1])
    frozen = {key for key in state if key.startswith(("task.teacher.", "task.expert."))}
    assert frozen == ({f"task.{METHODS[name].teacher}.source"} if METHODS[name].teacher else set())
    exported = load_student(whole / "last.ckpt", trust=True)
    assert type(exported.student.backbone) is (FusedNetwork if name == "ffl" else SmallNet)
    for key, value in exported.student.backbone.state_dict().items():
        assert any(torch.equal(value, other) for own, other in state.items() if own.endswith(f".{key}")), key
    write_student(exported, tmp_path / "student.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_losses_of_one(name: str, tmp_path: Path) -> None:
    """Networks normalised by groups, or by the statistics they have: two processes do not share those of a batch."""
    settings: dict[str, Any] = {
        **settings_of(name, tmp_path, NormalisedByGroups),
        "trainer__max_epochs": 1,
        "trainer__callbacks": "training_utils.Frozen",
        "trainer__precision": "64-true",
        "data__mixup": 0.0,
    }
    if name == "sskd":
        settings["task__similarity_weight"] = 0.0  # it compares the images of a batch
    assert main(small_run(tmp_path / "one", **settings, data__batch_size=50)) == 0
    words = small_run(tmp_path / "two", **settings, trainer__strategy="ddp", trainer__devices=2)
    running = process(words, processes=2)
    out, error = running.communicate(timeout=170)
    assert running.returncode == 0, out + error
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 2
    for expected, row in zip(one, two, strict=True):
        assert METHODS[name].terms <= set(row)
        for key, value in row.items():
            assert float(value) == pytest.approx(float(expected[key]), rel=1e-9), key


def test_a_classifier_of_ffl_is_exported_by_name(tmp_path: Path) -> None:
    shared = {"model__backbone": "frskd_fast.models.FFLResNet", "model__backbone_args": "{depth: 8}"}
    words = small_run(tmp_path / "run", task="frskd_fast.tasks.FFLTask", task__which="subnetwork_2", **shared)
    assert main([*words, "--trainer.max_steps", "1"]) == 0
    single = load_student(tmp_path / "run" / "last.ckpt", trust=True)
    assert isinstance(single.student.backbone, CIFARResNet)
    difference, limit, *_ = write_student(single, tmp_path / "single.pt2")
    assert difference <= limit
