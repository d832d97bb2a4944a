"""What the documents say is executed and compared with the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("migrate", "numerics", "data", "training"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def python_blocks() -> list[Any]:
    """Every Python block, with the newlines before it so that an error shows the document's own line number."""
    cases = []
    for document in EXECUTED:
        text = document.read_text(encoding="utf-8")
        for match in PYTHON_BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            name = f"{document.relative_to(ROOT).as_posix()}:{line + 1}"
            cases.append(pytest.param(str(document), "\n" * line + match.group(1), id=name))
    return cases


@pytest.mark.parametrize(("document", "code"), python_blocks())
def test_python_block_runs_on_its_own(
    document: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, document, "exec"), {"__name__": "document"})


@pytest.mark.parametrize("document", EXECUTED, ids=lambda document: document.name)
def test_document_has_blocks_to_run(document: Path) -> None:
    assert PYTHON_BLOCK.search(document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda document: document.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_every_environment_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "frskd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    used = set()
    for source in sources:
        used.update(re.findall(r"environ(?:\.get)?[(\[]\s*\"(\w+)\"", source.read_text(encoding="utf-8")))
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    for source in (ROOT / "csrc").rglob("*.cpp"):
        used.update(re.findall(r"getenv\(\"(\w+)\"", source.read_text(encoding="utf-8")))
    assert {"FRSKD_FAST_IMPL", "FRSKD_FAST_BUILD"} <= used
    assert used <= documented, f"used but not documented: {sorted(used - documented)}"
    assert documented <= used, f"documented but not used: {sorted(documented - used)}"


def test_documented_default_architectures_are_those_of_the_build() -> None:
    default = re.search(r'^DEFAULT_ARCHITECTURES = "(.+)"$', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    row = re.search(
        r"^\| `TORCH_CUDA_ARCH_LIST` \| `(.+?)` \|", (ROOT / "docs" / "environment.md").read_text("utf-8"), re.M
    )
    assert default is not None and row is not None
    assert row[1] == default[1]


def test_make_targets_named_in_the_documents_exist() -> None:
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", document.read_text(encoding="utf-8"), re.MULTILINE))
        assert named and named <= defined, document.name


def test_readme_has_one_place_for_each_generated_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("bench", "demo"):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert text.count(begin) == text.count(end) == 1
        assert text.index(begin) < text.index(end)
