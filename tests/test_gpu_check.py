"""scripts/gpu_check.py finds what it exercises: the problems that the operations declare."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = """
import sys

from frskd_fast import _dispatch


class Problem:
    name = "two and two"

    def run(self, implementation, device):
        assert 2 + 2 == {result}, implementation
        print("ran", implementation, "on", device)

PROBLEMS = [Problem()]
_dispatch.provide(__name__.rpartition(".")[2], "cpu", sys.modules[__name__])
"""


def exercise(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tree / "scripts" / "gpu_check.py"), "--exercise", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_file_of_problems_is_exercised(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "gpu_check.py", tmp_path / "scripts")
    folder = tmp_path / "tests" / "problems"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "problems" / "__init__.py", folder)
    none = exercise(tmp_path)
    assert none.returncode == 0 and "declares no problem" in none.stdout

    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(PROBLEM.format(result=4), encoding="utf-8")
    both = exercise(tmp_path)
    assert both.returncode == 0 and both.stdout.count("ran cpu on cpu") == 2
    assert "first: two and two" in both.stdout and "exercised 2 problems" in both.stdout

    (folder / "second.py").write_text(PROBLEM.format(result=5), encoding="utf-8")
    wrong = exercise(tmp_path)
    assert wrong.returncode != 0 and "AssertionError: cpu" in wrong.stderr
