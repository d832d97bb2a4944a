"""The short part of the campaign, always of the same seed; `make campaign` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from frskd_fast import _extension

if _extension.cpu_library_problem() is not None:
    pytest.skip(f"no C++ kernels: {_extension.cpu_library_problem()}", allow_module_level=True)

from campaign import calls, samples

from frskd_fast import functional

CALLS = 300


def test_calls_of_a_fixed_seed_have_no_findings() -> None:
    names = list(samples.sources())
    outcomes = {"result": 0, "refused": 0}
    threads = torch.get_num_threads()
    for index in range(CALLS):
        source = names[index % len(names)]
        call = samples.drawn(source, index)
        if call is not None:
            try:
                outcomes[calls.check(call, "cpu", index)] += 1
            except calls.Finding as finding:
                raise AssertionError(f"{finding} Again: scripts/campaign.py --repeat {source!r} {index}") from finding
    assert outcomes["result"] > CALLS // 2 and outcomes["refused"] > CALLS // 20
    assert torch.get_num_threads() == threads


def test_every_public_function_and_loss_is_called() -> None:
    names = set(samples.functions()) | set(samples.loss_names())
    assert {"kd_loss", "weighted_fusion", "FRSKDLoss", "SegmentationLoss"} <= names
    for name in names:
        call = samples.sources()[name](random.Random(0))
        assert call is not None and call.name == name


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda loss: loss * (1 + 1e-3), "error"),
        (lambda loss: loss.detach().nan_to_num(), "gradient of student_logits"),
        (lambda loss: loss + float("nan"), "not finite"),
        (lambda loss: loss.double(), "is torch.float64"),
    ],
)
def test_a_fault_is_found(fault: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a function that goes wrong wherever it does not take plain PyTorch."""
    original = functional.kd_loss

    def wrong(*arguments: object, **more: object) -> object:
        from frskd_fast import _dispatch

        loss = original(*arguments, **more)  # type: ignore[arg-type]
        return loss if _dispatch.forced() == "reference" else fault(loss)  # type: ignore[operator]

    samples.sources()  # what an example calls is caught before
    call = samples.drawn("kd_loss", 1, ("dtypes", "options", "values", "freed"))
    assert call is not None
    monkeypatch.setattr(functional, "kd_loss", wrong)
    with pytest.raises(calls.Finding, match=words):
        calls.check(call, "cpu", 0)


def test_a_killed_run_of_a_recipe_ends_as_one_that_nobody_killed(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    pytest.importorskip("sklearn")
    from campaign import kills

    from frskd_fast.training.recipe_files import recipe_names

    names = kills.recipes()
    assert {recipe_names()[name] for name in names} == set(recipe_names().values()), "a method without such a recipe"
    outcome = kills.trial(2, "digits_ffl", tmp_path)
    assert not outcome.finding
    table = tmp_path / "killed-2" / "steps.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("1", "2"), encoding="utf-8")
    checkpoint = torch.load(tmp_path / "killed-2" / "last.ckpt", weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] *= 2
    torch.save(checkpoint, tmp_path / "killed-2" / "last.ckpt")
    assert list(kills.differences(tmp_path / "whole-2", tmp_path / "killed-2")) == [
        "steps.csv",
        "last.ckpt['optimizer_states'][0]['param_groups'][0]['lr']",
    ]
