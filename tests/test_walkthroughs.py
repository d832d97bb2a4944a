"""The walkthroughs of docs/: the files of one run in a copy of the source tree, those of the other are all its method has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frskd_fast import _extension

ROOT = Path(__file__).resolve().parent.parent
# The name of a file in a paragraph of its own, and behind it what the file holds.
SHOWN_FILE = re.compile(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown_files(page: str) -> dict[str, str]:
    """Name and text of every file that a page of docs/ shows."""
    return dict(SHOWN_FILE.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))


def copy_with(files: dict[str, str], folder: Path) -> Path:
    """A copy of the tree in `folder` with `files` added; none of them may exist already."""
    without = shutil.ignore_patterns("__pycache__", "golden", "*.png")
    for name in ("frskd_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in files.items():
        assert not (folder / name).exists(), f"{name} is already there"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(*command: str, cwd: Path) -> str:
    """Output of `command`, which must succeed; imports come from `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compiled(source: Path, library: Path) -> None:
    """Compile one C++ file into a library of its own: building the whole package would take minutes."""
    root = Path(torch.__file__).parent
    run(
        str(shutil.which("g++")), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-Wall", "-Werror",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(root / "include"), str(source),
        f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(library),
        cwd=source.parent,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(_extension.cpu_library_problem() is not None, reason="needs the compiled library")
def test_the_operation_of_the_walkthrough_passes_its_tests(tmp_path: Path) -> None:
    files = shown_files("add_an_operation.md")
    tree = copy_with(files, tmp_path)
    compiled(tree / "csrc" / "cpu" / "scaled_difference.cpp", tree / "scaled_difference.so")
    with (tree / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write('\nimport frskd_fast.native\n\ntorch.ops.load_library("scaled_difference.so")\n')
    output = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_scaled_difference.py", cwd=tree
    )
    assert re.search(r"\b\d{2,} passed", output), output


def test_no_file_but_those_of_the_walkthrough_knows_its_method() -> None:
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    named = {
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "frskd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
        if re.search("collaborative", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert len(named) == 4
    assert named <= set(re.findall(r"`([\w/]+\.py)`", page))


def test_the_files_of_the_walkthrough_are_in_the_house_style(tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff")
    names = []
    for name, text in shown_files("add_an_operation.md").items():
        if name.endswith(".py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
            names.append(name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "kernels" / "_common.py").touch()
    run(ruff, "format", "--check", "--diff", *names, cwd=tmp_path)
    run(ruff, "check", "--ignore", "I001", *names, cwd=tmp_path)
