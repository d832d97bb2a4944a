"""The benchmark's comparison of commits: who is said to be slower, who takes turns with whom, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import commits, compare, results  # noqa: E402
from bench.case import Selection  # noqa: E402


def compared(*pairs: tuple[float, float]) -> compare.Compared:
    row = compare.Compared("loss", "loss N=2", "N=2", "fp32", "nchw", "forward", "auto", 0, pairs=list(pairs))
    row.judge()
    return row


def test_slower_is_said_beyond_the_spread_only() -> None:
    assert compared(*[(1.0, 1.04)] * 7).status == "ok"
    assert compared(*[(1.0, 1.06)] * 7).status == "slower"
    # As slow in the middle, but a third of the rounds say the opposite.
    assert compared(*[(1.0, 1.06)] * 4, *[(1.0, 0.9)] * 3).status == "unclear"
    row = compared((2.0, 1.0), (4.0, 2.0), (1.0, 0.5))
    assert (row.status, row.ratio, row.base_ms, row.ms) == ("ok", 0.5, 2.0, 1.0)


def fake_package(root: Path, seconds: float, factor: float = 1.0) -> Path:
    """A frskd_fast with what the suite `attention` asks for alone, which takes so long and gives so many times the truth."""
    package = root / "frskd_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from frskd_fast import functional\ndef last_impl(): return dict(functional.last)\n", encoding="utf-8"
    )
    (package / "functional.py").write_text(
        "import time\n"
        "from torch.nn.functional import normalize\n"
        "last = {}\n"
        "def attention(f): return normalize(f.double().pow(2).mean(1).flatten(1))\n"
        "def attention_transfer(students, teachers, impl):\n"
        "    last['attention'] = 'reference' if impl == 'reference' else 'fake'\n"
        f"    time.sleep({seconds})\n"
        "    pairs = zip(students, teachers, strict=True)\n"
        "    return sum((attention(s) - attention(t)).pow(2).mean() for s, t in pairs).float() * "
        f"{factor}\n",
        encoding="utf-8",
    )
    return root


@pytest.mark.slow
def test_two_commits_take_turns(tmp_path: Path) -> None:
    """Each side imports its own package; the slower one is named, and looked at twice; the wrong one gets no time."""
    base = fake_package(tmp_path / "base", 0.0)
    selection = Selection(dtypes=("fp32",), layouts=("nchw",), batch=2, input_kind="random", quick=True)

    def rows(this: Path) -> list[dict[str, Any]]:
        libraries = {"base": base, "this": this}
        return compare.compare(libraries, selection, ["attention"], ["auto"], warm=False, threads=1, repeats=3)

    (row,) = rows(fake_package(tmp_path / "slower", 0.05))
    assert row["status"] == "slower" and row["ratio"] > 1.5 and len(row["pairs"]) == 6
    assert row["picked"] == row["base_picked"] == "fake" and row["same_bits"]
    document = {"rows": [row], "base": "b" * 40, "environment": {"commit": "a" * 40}}
    assert row["case"] in compare.text(document) and "this: commit aaaaaaaaaaaa" in compare.text(document)
    assert results.failures(document) == [row]

    (row,) = rows(fake_package(tmp_path / "wrong", 0.0, factor=1.01))
    assert row["status"] == "WRONG" and row["ratio"] is None and results.failures({"rows": [row]}) == [row]


def test_comparing_refuses_what_it_cannot_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match=r"git rev-parse failed: .*not a git repository"):
        commits.resolve("HEAD")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="'no-such-commit', but this repository has no such commit; fetch it"):
        commits.resolve("no-such-commit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs git"):
        commits.resolve("HEAD")
