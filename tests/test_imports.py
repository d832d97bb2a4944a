"""Who may import whom: the table of docs/architecture.md against the imports of every file, also those by name.

Everybody may import the standard library, torch, numpy, and their own floor.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from frskd_fast import _dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "frskd_fast"
EVERYWHERE = ("__future__", "torch", "numpy")
ARCHITECTURE = ROOT / "docs" / "architecture.md"


class Floor(NamedTuple):
    """One row of the table: files by pattern, and what they may import besides themselves and the standard library."""

    patterns: tuple[str, ...]
    allowed: frozenset[str]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@functools.cache
def floors() -> list[Floor]:
    """The rows of the tables whose last column is "may import"."""
    found = []
    columns: list[str] = []
    for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = _cells(line)
        elif columns[-1] == "may import" and not line.startswith("| -"):
            first, *_, last = _cells(line)
            patterns = tuple(re.sub(r"<\w+>", "*", name) for name in re.findall(r"`([^`]+)`", first))
            allowed = frozenset(re.findall(r"[\w.]+", last.replace("`", "")))
            found.append(Floor(patterns, allowed))
    return found


def floor_of(path: str) -> Floor | None:
    """The row of a file: that with the longest pattern that fits."""
    fitting = [
        (len(pattern), floor)
        for floor in floors()
        for pattern in floor.patterns
        if fnmatch.fnmatch(path, pattern) or (pattern.endswith("/") and path.startswith(pattern))
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def module_name(path: Path, root: Path = ROOT) -> str:
    """ "frskd_fast.kernels.logits" for kernels/logits.py."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = (PACKAGE, *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Every module that a file imports, at its top or within a function, by statement or by `import_module`."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # `from frskd_fast import ops` imports the module frskd_fast.ops.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def floor_name(module: str) -> str:
    """ "ops" for frskd_fast.ops.logits, "torch" for torch.nn, "timm" for timm.models."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0]
    return parts[1] if len(parts) > 1 else PACKAGE


FILES = sorted(path for folder in (PACKAGE, "kernels", "bench") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in FILES])
def test_imports_keep_to_the_table(path: str) -> None:
    floor = floor_of(path)
    assert floor is not None, f"{path} is on no floor of docs/architecture.md"
    if "everything" in floor.allowed:
        return
    own = floor_name(module_name(ROOT / path))
    for module in imported(ROOT / path):
        name = floor_name(module)
        if name in sys.stdlib_module_names or name in (own, *EVERYWHERE):
            continue
        assert name in floor.allowed, f"{path} imports {module}, but its floor may import {sorted(floor.allowed)}"


def test_the_check_reads_both_kinds_of_imports(tmp_path: Path) -> None:
    file = tmp_path / "frskd_fast" / "probe.py"
    file.parent.mkdir()
    source = "from . import ops\nfrom .ops import logits\nimport torch.nn\nimportlib.import_module('triton')\n"
    file.write_text(source, encoding="utf-8")
    assert list(imported(file, tmp_path)) == ["frskd_fast.ops", "frskd_fast.ops.logits", "torch.nn", "triton"]


def compared_implementations(source: str) -> Iterator[str]:
    """The comparisons with the name of an implementation; of a kind of device, which has the same names, are none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            constants = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
            of_device = any(re.search(r"device|accelerator|\.type$", ast.unparse(side)) for side in sides)
            if constants & set(_dispatch.IMPLEMENTATIONS) and not of_device:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in FILES if "bench" not in path.parts])
def test_only_the_table_compares_the_name_of_an_implementation(path: str) -> None:
    if path != "frskd_fast/_dispatch.py":
        assert list(compared_implementations((ROOT / path).read_text(encoding="utf-8"))) == []


def test_the_check_finds_such_a_comparison() -> None:
    source = "impl == 'cpu' or name in ('triton', 'cuda') or x.device.type != 'cpu' or kind == 'mean'"
    assert list(compared_implementations(source)) == ["impl == 'cpu'", "name in ('triton', 'cuda')"]


def test_every_row_of_the_table_has_files() -> None:
    files = [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
    ]
    for floor in floors():
        for pattern in floor.patterns:
            fits = any(fnmatch.fnmatch(file, pattern) or file.startswith(pattern) for file in files)
            assert fits, f"docs/architecture.md names {pattern}, which is no file"
