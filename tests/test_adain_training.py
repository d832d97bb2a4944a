"""AdaIN-KD in the trainer: a run that goes on bit for bit, two processes, and the export of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import NormalisedByGroups, SmallNet, epochs, process, same_weights, small_run, steps, weights

from frskd_fast.tasks import AdaINTask
from frskd_fast.training.cli import main
from frskd_fast.training.export import load_student, write_student


class ConnectedByGroups(AdaINTask):
    """Connectors that take no statistics of the batch, which two processes do not share."""

    def __init__(self, backbone: nn.Module, teacher: nn.Module | str, teacher_name: str | None = None) -> None:
        super().__init__(backbone, teacher, teacher_name=teacher_name)
        for connector in self.connectors:
            connector[1] = nn.GroupNorm(4, connector[1].num_features)


def settings_with(teacher: Path, network: type[SmallNet], task: type[AdaINTask]) -> dict[str, Any]:
    """Two networks of a kind, of which the trained one is in a file."""
    name = f"training_utils.{network.__name__}"
    torch.save(network(10).state_dict(), teacher)
    return {
        "task": f"{task.__module__}.{task.__name__}",
        "model__backbone": name,
        "task__teacher": teacher,
        "task__teacher_name": name,
    }


def test_a_run_goes_on_bit_for_bit_and_its_student_is_exported(tmp_path: Path) -> None:
    settings = {**settings_with(tmp_path / "teacher.pt", SmallNet, AdaINTask), "trainer__max_epochs": 2}
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert main(small_run(whole, **settings)) == 0
    words = small_run(folder, **settings)
    assert main([*words, "--trainer.max_steps", "6"]) == 0
    assert len(steps(folder)) == 6
    assert main(words) == 0
    assert steps(folder) == steps(whole) and epochs(folder) == epochs(whole)
    assert same_weights(weights(folder), weights(whole))
    assert {"task.teacher.source", "task.connectors.1.0.weight"} <= set(weights(folder))
    assert not any(name.startswith("task.teacher.network") for name in weights(folder))
    assert {"train/transfer_2", "train/std_1", "train/teacher_accuracy"} <= set(epochs(whole)[-1])
    exported = load_student(whole / "last.ckpt", trust=True)
    assert isinstance(exported.student.backbone, SmallNet)
    assert torch.equal(exported.student.backbone.fc.weight, weights(whole)["task.backbone.fc.weight"])
    write_student(exported, tmp_path / "student.safetensors")


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **settings_with(tmp_path / "teacher.pt", NormalisedByGroups, ConnectedByGroups),
        "trainer__max_epochs": 1,
        "trainer__precision": "64-true",
        "data__mixup": 0.0,
    }
    assert main(small_run(tmp_path / "one", **settings, data__batch_size=50)) == 0
    words = small_run(tmp_path / "two", **settings, trainer__strategy="ddp", trainer__devices=2)
    running = process(words, processes=2)
    out, error = running.communicate(timeout=170)
    assert running.returncode == 0, out + error
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 2
    for expected, row in zip(one, two, strict=True):
        assert {"mean_1", "transfer_2"} <= set(row)
        for name, value in row.items():
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-9), name
