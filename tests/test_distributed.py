"""Two processes over gloo, started by torchrun: losses and gradients are those of one process on the joint batch.

Statistics of a batch cannot be part of this comparison on a CPU: BatchNorm sees each process's own images, and
SyncBatchNorm, which would see all, has no CPU kernel. So the student is normalised by groups and the self-teacher's
BatchNorms keep their running statistics; every other part of the step is as in training. Each term of the loss is a mean
over images, so with equal shares the mean over the processes is the joint mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from training_utils import epochs, process, small_run, steps

from frskd_fast.models import wrn16x2
from frskd_fast.tasks import FRSKDTask
from frskd_fast.training.checkpoints import Progress, find_checkpoint, problem_with
from frskd_fast.training.cli import main
from frskd_fast.training.export import load_student

COMMON = {
    "model__backbone": "training_utils.NormalisedByGroups",
    "lr_scheduler": "null",
    "data__mixup": 0.0,
    "trainer__max_epochs": 2,
    "trainer__precision": "64-true",
    "trainer__callbacks": "training_utils.Witness",
    "checkpoint__every_n_steps": 1,
}
TWO = {"trainer__strategy": "ddp", "trainer__devices": 2, "data__batch_size": 25}
# Sums over images are taken in another order: a few roundings of float64 in each of some thirty layers and four steps.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def run(words: list[str], processes: int) -> None:
    running = process(words, processes=processes)
    out, error = running.communicate(timeout=170)
    assert running.returncode == 0, out + error


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One process with batches of 50, and two with 25 each, stopped within the second epoch and started again."""
    folder = tmp_path_factory.mktemp("distributed")
    one, two = folder / "one", folder / "two"
    assert main(small_run(one, **COMMON, data__batch_size=50)) == 0
    run([*small_run(two, **COMMON, **TWO), "--trainer.max_steps", "3"], processes=2)
    run(small_run(two, **COMMON, **TWO), processes=2)
    return one, two


def gradients(folder: Path, rank: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for path in sorted(folder.glob(f"gradients-{rank}-from*.pt"), key=lambda path: -int(path.stem.split("from")[1])):
        found += torch.load(path, weights_only=True)
    return found


def test_losses_are_those_of_one_process_on_the_joint_batch(runs: tuple[Path, Path]) -> None:
    one, two = map(steps, runs)
    assert len(one) == len(two) == 4
    for expected, row in zip(one, two, strict=True):
        assert {"loss", "ce_student", "ce_teacher", "kd", "feature"} <= set(row)
        for name, value in row.items():
            assert float(value) == pytest.approx(float(expected[name]), rel=TOLERANCE["rtol"]), name


def test_gradients_are_those_of_one_process_on_the_joint_batch(runs: tuple[Path, Path]) -> None:
    one = gradients(runs[0], 0)
    assert len(one) == 4 and any(name.startswith("task.self_teacher.") for name in one[0])
    for rank in (0, 1):
        for expected, actual in zip(one, gradients(runs[1], rank), strict=True):
            assert expected.keys() == actual.keys()
            for name, value in actual.items():
                torch.testing.assert_close(value, expected[name], **TOLERANCE)


def test_means_over_an_epoch_and_accuracy_count_every_image_once(runs: tuple[Path, Path]) -> None:
    """The second epoch of the two processes was interrupted after its first step."""
    one, two = map(epochs, runs)
    assert len(one) == len(two) == 2
    for expected, row in zip(one, two, strict=True):
        for name, value in row.items():
            # Metrics are float32 numbers of order 1; the calibration error is a difference of two such.
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-6, abs=1e-6), name


def test_sharded_parameters_and_checkpoints_give_the_same_losses(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """FSDP2: backbone, self-teacher and loss as units, on channels_last images; the checkpoint is a folder, and the run goes on
    from it within the epoch."""
    folder = tmp_path / "sharded"
    strategy = {
        "trainer__strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
        "trainer__strategy__data_parallel_size": 2,
        "trainer__strategy__tensor_parallel_size": 1,
    }
    settings = {**COMMON, **TWO, **strategy, "trainer__max_epochs": 1, "trainer__precision": "32-true"}
    settings["trainer__callbacks"] = "training_utils.Frozen"
    run([*small_run(folder, **settings), "--trainer.max_steps", "1"], processes=2)
    assert find_checkpoint(folder).progress == Progress(0, 1)  # type: ignore[union-attr]
    run(small_run(folder, **settings), processes=2)
    for expected, row in zip(steps(runs[0])[:2], steps(folder), strict=True):
        for name, value in row.items():
            # Float32, which is all that the strategy offers beside half precision, against the float64 of the joint batch.
            # kd is about the square of differences of logits, some 0.1 of numbers of order 1 with 6 digits.
            tolerance = 1e-4 if name == "kd" else 1e-5
            assert float(value) == pytest.approx(float(expected[name]), rel=tolerance), name
    assert problem_with(folder / "last.ckpt") is None and (folder / "last.ckpt").is_dir()
    assert find_checkpoint(folder).progress == Progress(1, 2)  # type: ignore[union-attr]
    assert load_student(folder / "last.ckpt", trust=True).num_classes == 10


@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (3, 3)])
def test_processes_of_torchrun_that_the_settings_do_not_know(
    nodes: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would train on its own, or the images of processes that are not there would be left out; the number of nodes
    follows torchrun, which may start with fewer after a failure."""
    environment = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": 1}
    environment |= {"GROUP_WORLD_SIZE": nodes, "TORCHELASTIC_RUN_ID": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    created: list[Any] = []
    original = LightningCLI.instantiate_trainer

    def watched(self: Any, **arguments: Any) -> Any:
        created.append(original(self, **arguments))
        return created[-1]

    monkeypatch.setattr(LightningCLI, "instantiate_trainer", watched)
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)
    folder = tmp_path / "run"
    words = small_run(folder, trainer__strategy="ddp", trainer__devices=1)
    assert main(words) == (1 if nodes == 1 else 0)
    assert created[0].num_nodes == nodes
    if nodes == 1:
        assert "torchrun started 2 processes on 1 nodes, but the settings say 1 on 1" in capsys.readouterr().err


def test_every_parameter_that_trains_gets_a_gradient() -> None:
    """So that DistributedDataParallel needs no find_unused_parameters, for the network with the original's unused `bn1` too."""
    task = FRSKDTask(wrn16x2(num_classes=3))
    task(torch.randn(2, 3, 16, 16), torch.tensor([0, 2]))["loss"].backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
