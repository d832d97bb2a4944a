"""FFL in the trainer: a run that goes on bit for bit, two processes, and the export of what `which` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import epochs, process, same_weights, small_run, steps, weights

from frskd_fast.models import CIFARResNet
from frskd_fast.tasks import FusedNetwork
from frskd_fast.training.cli import main
from frskd_fast.training.export import load_student, write_student

TASK: dict[str, Any] = {"task": "frskd_fast.tasks.FFLTask", "task__ramp_epochs": 2, "trainer__max_epochs": 2}
SHARED = {**TASK, "model__backbone": "frskd_fast.models.FFLResNet", "model__backbone_args": "{depth: 8}"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("ffl") / "whole"
    assert main(small_run(folder, **SHARED)) == 0
    return folder


def test_a_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Stopped within the second epoch, where the ramp has moved."""
    folder = tmp_path / "stopped"
    words = small_run(folder, **SHARED)
    assert main([*words, "--trainer.max_steps", "6"]) == 0
    assert len(steps(folder)) == 6
    assert main(words) == 0
    assert steps(folder) == steps(whole) and epochs(folder) == epochs(whole)
    assert same_weights(weights(folder), weights(whole))
    assert weights(whole)["task.consistency_weight"] == torch.tensor(-5 / 4).exp()


def test_every_classifier_is_measured_and_exported(whole: Path, tmp_path: Path) -> None:
    row = epochs(whole)[-1]
    names = ("subnetwork_1", "subnetwork_2", "ensemble")
    assert {f"validation/{name}_accuracy" for name in names} | {"train/fused_kd"} <= set(row)
    fused = load_student(whole / "last.ckpt", trust=True)
    assert isinstance(fused.student.backbone, FusedNetwork)
    written = write_student(fused, tmp_path / "fused.pt2")
    assert written.difference <= written.limit and not written.any_size
    folder = tmp_path / "single"
    assert main([*small_run(folder, **SHARED, task__which="subnetwork_2"), "--trainer.max_steps", "1"]) == 0
    single = load_student(folder / "last.ckpt", trust=True)
    assert isinstance(single.student.backbone, CIFARResNet)
    write_student(single, tmp_path / "single.safetensors")


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Independent networks normalised by groups; the fusion module's BatchNorms keep their statistics, which two processes
    do not share."""
    settings: dict[str, Any] = {
        **TASK,
        "trainer__max_epochs": 1,
        "model__backbone": "training_utils.NormalisedByGroups",
        "trainer__callbacks": "training_utils.Frozen",
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
        assert "fused_kd" in row
        for name, value in row.items():
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-9), name
