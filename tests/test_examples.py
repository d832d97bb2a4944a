"""examples/digits.py: it runs, keeps its promises of a fair comparison, and says what its numbers say."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "digits.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

for dependency in ("sklearn", "scipy", "matplotlib", "tqdm"):
    pytest.importorskip(dependency)


def run_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would, from another folder than the repository."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1", "MPLCONFIGDIR": str(folder / "matplotlib")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def split(digits: ModuleType) -> Any:
    return digits.load_split()


class SilentProgress:
    def set_postfix(self, **_: Any) -> None: ...

    def update(self) -> None: ...


@pytest.mark.slow
def test_quick_run_writes_table_json_and_plots(tmp_path: Path) -> None:
    finished = run_python(str(SCRIPT), "--quick", "--device", "cpu", "--out", "results", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))

    settings = results["settings"]
    assert settings["training_images"] == 10 * settings["labels_per_class"]
    assert settings["evaluate_on"] == "test" and settings["evaluation_images"] == 1797 - 400
    assert {"alpha", "beta", "temperature", "learning_rate", "weight_decay", "batch_size", "device"} <= settings.keys()

    runs = results["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(0, "ce"), (0, "frskd"), (1, "ce"), (1, "frskd")]
    for run in runs:
        assert all(len(curve) == settings["epochs"] for curve in run["curves"].values())
        assert 0 <= run["student_accuracy_percent"] <= 100
    for run in runs[1::2]:
        curves = run["curves"]
        for epoch, loss in enumerate(curves["loss"]):
            weighted = settings["alpha"] * curves["kd"][epoch] + settings["beta"] * curves["feature"][epoch]
            assert loss == pytest.approx(curves["ce_student"][epoch] + curves["ce_teacher"][epoch] + weighted, rel=1e-4)
    accuracies = [run["student_accuracy_percent"] for run in runs]
    assert results["paired_differences"] == [accuracies[1] - accuracies[0], accuracies[3] - accuracies[2]]

    lines = finished.stdout.splitlines()
    for row, line in zip(results["rows"], lines[2:5], strict=True):
        assert line.startswith(f"| {row['network']}")
        assert f"{row['mean']:.2f} ± {row['deviation']:.2f}" in line
    assert results["verdict"] in lines
    assert f"{results['total_seconds']:.0f} s in total" in lines[-1]

    for name in ("loss_curves.png", "attention_maps.png"):
        content = (tmp_path / "results" / name).read_bytes()
        assert content.startswith(PNG_SIGNATURE) and len(content) > 5000, name


def test_json_goes_to_standard_output_and_table_into_the_readme(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{digits.README_BEGIN}\nold\n{digits.README_END}\nafter\n", encoding="utf-8")
    options = ["--seeds", "1", "--epochs", "1", "--labels-per-class", "2", "--batch-size", "10", "--device", "cpu"]
    digits.main([*options, "--json", "--out", str(tmp_path / "out"), "--update-readme", str(readme)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    wanted = f"before\n{digits.README_BEGIN}\n{digits.table(printed)}\n{digits.README_END}\nafter\n"
    assert readme.read_text(encoding="utf-8") == wanted


def test_readme_without_markers_is_refused_and_kept(digits: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="add them where the table goes"):
        digits.update_readme(readme, "table")
    assert readme.read_text(encoding="utf-8") == "no markers\n"


def test_training_never_sees_test_images(digits: ModuleType, split: Any) -> None:
    test = set(split.test.tolist())
    assert len(test) == len(split.test) and test.isdisjoint(split.pool.tolist())
    draws = []
    for seed in range(3):
        training, validation = digits.draw_training_images(split, 10, seed)
        assert test.isdisjoint(training.tolist()) and test.isdisjoint(validation.tolist())
        assert set(training.tolist()) | set(validation.tolist()) == set(split.pool.tolist())
        assert set(training.tolist()).isdisjoint(validation.tolist())
        assert torch.bincount(split.labels[training], minlength=10).tolist() == [10] * 10
        draws.append(sorted(training.tolist()))
    assert draws[0] != draws[1] != draws[2] != draws[0]


def test_both_methods_get_the_same_start_and_the_same_batches(
    digits: ModuleType, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_images = digits.shift_images
    batches: dict[str, list[torch.Tensor]] = {"ce": [], "frskd": []}
    options = ["--epochs", "2", "--labels-per-class", "2", "--batch-size", "10", "--learning-rate", "0"]
    settings = digits.parse_arguments([*options, "--device", "cpu"])
    students = {}
    for method, seen in batches.items():

        def record(images: torch.Tensor, generator: torch.Generator, seen: Any = seen) -> torch.Tensor:
            shifted: torch.Tensor = shift_images(images, generator)
            seen.append(shifted)
            return shifted

        monkeypatch.setattr(digits, "shift_images", record)
        # A learning rate of 0 keeps the initial weights, so the trained students show how they started.
        students[method] = digits.train(method, 5, split, settings, SilentProgress()).student
    assert len(batches["ce"]) == len(batches["frskd"]) == 4
    for baseline, distilled in zip(batches["ce"], batches["frskd"], strict=True):
        assert torch.equal(baseline, distilled)
    assert not torch.equal(batches["ce"][0], batches["ce"][2])
    distilled_parameters = dict(students["frskd"].named_parameters())
    for name, parameter in students["ce"].named_parameters():
        assert torch.equal(parameter, distilled_parameters[name]), name


def test_training_lowers_the_loss_of_both_methods(digits: ModuleType, split: Any) -> None:
    settings = digits.parse_arguments(["--epochs", "5", "--device", "cpu"])
    for method in ("ce", "frskd"):
        losses = digits.train(method, 0, split, settings, SilentProgress()).record["curves"]["loss"]
        assert losses[-1] < losses[0]


def test_shifted_images_are_shifts_on_the_background(digits: ModuleType, split: Any) -> None:
    images = split.images[:50]
    shifted = digits.shift_images(images, torch.Generator().manual_seed(0))
    background = images.min()
    largest, side = digits.LARGEST_SHIFT, images.shape[-1]
    canvas = torch.full((len(images), side + 2 * largest, side + 2 * largest), background.item())
    canvas[:, largest:-largest, largest:-largest] = images[:, 0]
    found = set()
    for index in range(len(images)):
        windows = {
            (row, column): canvas[index, row : row + side, column : column + side]
            for row in range(2 * largest + 1)
            for column in range(2 * largest + 1)
        }
        matches = [
            offset
            for offset, window in windows.items()
            if torch.allclose(window, shifted[index, 0], rtol=0.0, atol=1e-6)
        ]
        assert matches, f"image {index} is not a shift of the original"
        found.update(matches)
    assert len(found) > 10  # every image gets its own of the 25 offsets


@pytest.mark.parametrize(
    ("differences", "beginning"),
    [
        ([2.0, 2.5, 1.5, 2.2], "FRSKD is ahead by 2.0 ± "),
        ([-2.0, -2.5, -1.5, -2.2], "FRSKD is behind by 2.0 ± "),
        ([2.0, -2.5, 1.5, -2.2], "No difference beyond the spread: -0.3 ± "),
        ([0.0, 0.0], "No difference beyond the spread: +0.0 ± 0.0"),
        ([-1.0], "FRSKD minus cross-entropy is -1.0 percentage points on one seed"),
    ],
)
def test_verdict_follows_the_numbers(digits: ModuleType, differences: list[float], beginning: str) -> None:
    assert digits.verdict(differences).startswith(beginning)


def test_docstring_examples_hold(digits: ModuleType) -> None:
    result = doctest.testmod(digits)
    assert result.attempted > 0 and result.failed == 0


def test_verdict_interval_is_the_t_interval(digits: ModuleType) -> None:
    import scipy.stats

    differences = [1.0, 3.0, 2.5, 0.5, 2.0]
    low, high = scipy.stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert f"ahead by {(low + high) / 2:.1f} ± {(high - low) / 2:.1f} " in digits.verdict(differences)


@pytest.mark.parametrize(
    ("missing", "advice"), [("sklearn", "pip install scikit-learn matplotlib tqdm"), ("frskd_fast", "pip install .")]
)
def test_missing_package_is_one_sentence_that_says_what_to_install(missing: str, advice: str, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    finished = run_python("-c", code, folder=tmp_path)
    assert finished.returncode == 1
    assert advice in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "options",
    [["--labels-per-class", "41"], ["--labels-per-class", "40", "--evaluate-on", "validation"], ["--seeds", "0"]],
)
def test_impossible_options_are_refused(
    digits: ModuleType, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        digits.parse_arguments(options)
    assert "must be" in capsys.readouterr().err
