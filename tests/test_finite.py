"""A run whose loss or weights are not finite stops, skips or goes on, as it was told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import PLAIN, small_run, steps

from frskd_fast.training.cli import main

POISON = {"trainer__callbacks": "training_utils.PoisonedImage", "task": PLAIN, "guard": "false"}
BAD_GRADIENTS = {**POISON, "trainer__callbacks": "training_utils.PoisonedGradients"}


def finite(file: Path) -> bool:
    state = torch.load(file, weights_only=True)["state_dict"]
    return all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point())


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = small_run(
        folder, optimizer__lr=1e12, task=PLAIN, checkpoint__every_n_steps=1, trainer__log_every_n_steps=50
    )
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "not finite, as of step" in error and "--on_nan skip" in error
    assert "Traceback" not in error
    for file in folder.glob("*.ckpt"):
        assert finite(file)


def test_bad_weights_are_not_saved_before_the_loss_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(small_run(folder, **BAD_GRADIENTS, checkpoint__every_n_steps=1)) == 1
    assert "Weights are not finite, as of step 3" in capsys.readouterr().err
    assert finite(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("together", [1, 2])
def test_a_step_with_bad_gradients_is_left_out(together: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    accumulated = {"trainer__accumulate_grad_batches": together}
    assert main(small_run(folder, **POISON, **accumulated, on_nan="skip", trainer__max_epochs=2)) == 0
    assert finite(folder / "last.ckpt")
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["callbacks"]["FiniteGuard"] == {"skipped": 1}
    assert len(steps(folder)) == 8


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_mask_of_infinities_is_no_sign_of_anything(on_nan: str, tmp_path: Path) -> None:
    words = small_run(tmp_path / "run", model__backbone="training_utils.Masked", task=PLAIN, on_nan=on_nan)
    assert main([*words, "--trainer.max_epochs", "1"]) == 0


def test_told_to_continue_a_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(small_run(folder, **POISON, on_nan="continue", trainer__max_epochs=2)) == 0
    assert not finite(folder / "last.ckpt")


def test_a_run_that_only_skips_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = small_run(folder, optimizer__lr=1e30, task=PLAIN, on_nan="skip", trainer__max_epochs=20, guard="false")
    assert main(words) == 1
    assert "20 steps in a row" in capsys.readouterr().err
