"""scripts/evidence.py: its tables come from logs, and from the result file that it keeps of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a document and a folder for results of its own."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location("evidence", ROOT / "scripts" / "evidence.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "docs" / "evidence.md")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    lines = [line for begin, end in map(module.markers, module.STUDIES) for line in (begin, module.UNMEASURED, end)]
    module.DOCUMENT.write_text("\n".join(["Above.", *lines, "Below."]), encoding="utf-8")
    return module


def log_run(folder: Path, accuracies: list[float], peak: int = 7_000_000, score: str = "accuracy") -> None:
    """What a finished run leaves; its score is measured every second epoch."""
    folder.mkdir(parents=True)
    rows = [f"{epoch},{0.25},{value if epoch % 2 else ''}" for epoch, value in enumerate(accuracies)]
    (folder / "epochs.csv").write_text("\n".join([f"epoch,seconds,validation/{score}", *rows]) + "\n", encoding="utf-8")
    about = {"peak": peak, "python": "3.12", "machine": "abacus", "cores": 2}
    (folder / "process.json").write_text(json.dumps(about), encoding="utf-8")


def test_tables_come_from_the_logs_and_then_from_the_result_file(evidence: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed, (plain, distilled) in enumerate([(0.5, 0.75), (0.25, 0.75)]):
        log_run(runs / f"ce-seed{seed}", [0.0, 0.1, 0.0, plain])
        # A first seed's process that trained the teacher, too, is larger.
        log_run(runs / f"hsakd-seed{seed}", [0.0, distilled], peak=(9 - seed) * 1_000_000)
        log_run(runs / f"sskd-seed{seed}", [0.0, distilled])
        log_run(runs / f"collaborative-seed{seed}", [0.0, distilled])
    log_run(runs / "digits_hsakd_teacher", [0.0, 0.875])
    evidence.main(["--study", "teachers", "--out", str(runs), "--only-report"])

    content = evidence.DOCUMENT.read_text("utf-8")
    assert "| cross-entropy | 2 | 37.50 ± 17.68 | - | 4 | 1 | 7 |" in content
    assert "| HSAKD, from `digits_hsakd_teacher` | 2 | 75.00 ± 0.00 | +37.50 ± 158.83 | 2 | 0 | 8 |" in content
    assert "| SSKD, from `digits_sskd_head` on `digits_resnet20_plain` | 2 |" in content
    assert "| CollaborativeTeaching, from `digits_resnet20_plain` | 2 |" in content
    assert all(line.count("|") == 8 for line in content.splitlines() if line.startswith("|"))
    assert "* HSAKD: no difference from cross-entropy could be shown, +37.50 ± 158.83 percentage points." in content
    assert "`digits_hsakd_teacher` 87.50 %" in content and "`--config digits_hsakd`" in content
    assert content.startswith("Above.") and content.endswith("Below.")
    assert (evidence.DOCUMENT.parent / "evidence-teachers.png").is_file()

    # Whoever has no logs has the result file.
    (kept,) = evidence.RESULTS.glob("*-evidence-teachers.json")
    evidence.main(["--study", "teachers", "--out", str(kept)])
    assert evidence.DOCUMENT.read_text("utf-8") == content
    evidence.main(["--check"])
    evidence.DOCUMENT.write_text(content.replace("37.50", "73.50", 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=kept.name):
        evidence.main(["--check"])


def test_maps_are_compared_by_their_score(evidence: Any, tmp_path: Path) -> None:
    for name, score in (("ce", 0.25), ("frskd", 0.375)):
        log_run(tmp_path / "runs" / f"{name}-seed0", [0.0, score], score="miou")
    evidence.main(["--study", "segmentation", "--out", str(tmp_path / "runs"), "--only-report"])
    content = evidence.DOCUMENT.read_text("utf-8")
    assert "| test mIoU, % (mean" in content and "| FRSKD | 1 | 37.50 | +12.50 |" in content
    evidence.main(["--check"])


def test_runs_of_different_lengths_do_not_compare(evidence: Any, tmp_path: Path) -> None:
    log_run(tmp_path / "runs" / "ce-seed0", [0.0, 0.1])
    log_run(tmp_path / "runs" / "ce-seed1", [0.0, 0.1, 0.0, 0.2])
    with pytest.raises(SystemExit, match=r"\[2, 4\] epochs"):
        evidence.main(["--study", "teachers", "--out", str(tmp_path / "runs"), "--only-report"])


@pytest.mark.parametrize("left", ["", "| method | accuracy |", "Not measured yet. | KD | 99 |"])
def test_a_study_without_result_file_says_so_and_nothing_else(evidence: Any, left: str) -> None:
    evidence.main(["--check"])
    content = evidence.DOCUMENT.read_text("utf-8")
    evidence.DOCUMENT.write_text(content.replace(evidence.UNMEASURED, left, 1), encoding="utf-8")
    with pytest.raises(SystemExit, match="the study frskd names no result file"):
        evidence.main(["--check"])


def test_what_a_run_needs_is_trained_before_in_processes_of_its_own(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run's peak memory is its own, and where the run looks for them."""
    begun: list[tuple[str, str]] = []

    def fit(words: list[str], folder: Path) -> int:
        begun.append((words[1], folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        assert words[words.index("--run_dir") + 1] == str(folder)
        return 5

    monkeypatch.setattr(evidence, "fit", fit)
    evidence.train(tmp_path / "runs", "sskd", evidence.STUDIES["teachers"]["sskd"], 3, [])
    assert begun == [
        ("digits_resnet20_plain", "digits_resnet20_plain"),
        ("digits_sskd_head", "digits_sskd_head"),
        ("digits_sskd", "sskd-seed3"),
    ]
    assert json.loads((tmp_path / "runs" / "sskd-seed3" / "process.json").read_text("utf-8"))["peak"] == 5
