"""Result files: how they are written, read, and asked for the rows that lose, fail or belong together."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from bench.names import is_ours

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 2
COMPARISON = "comparison of commits, 2"
# How much slower than eager PyTorch (or than another commit) a row may be before it counts.
TOLERATED = 1.05
# A path from the root of a file system; a slash inside a word, a URL or a relative path is none.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:~/\\])(?:[A-Za-z]:[\\/]|/)[\w.+@~-]+(?:[\\/][\w.+@~-]+)*")

Document = dict[str, Any]
Row = dict[str, Any]


def load(path: Path, schema: int | str = SCHEMA) -> Document:
    """Read a result file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("schema") if isinstance(document, dict) else None
    if found != schema:
        raise ValueError(
            f"{path} has schema {found!r}, but {schema!r} was wanted; write it anew by bench/run.py --json."
        )
    return dict(document)


def portable(text: str) -> str:
    """`text` without the folders of this machine: paths below the checkout are relative to it, others a name alone."""

    def shortened(match: re.Match[str]) -> str:
        path = PurePath(match[0])
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else re.split(r"[\\/]", match[0])[-1]

    return ABSOLUTE_PATH.sub(shortened, text)


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinities as strings, which strict JSON cannot hold as numbers, and no path of this machine."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return portable(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def save(document: Document, path: Path) -> None:
    """Write a result file; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(jsonable(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def by_case(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows grouped by case, in the order of the run."""
    return [(name, list(group)) for name, group in itertools.groupby(rows, key=lambda row: str(row["case"]))]


def of_ours(document: Document) -> list[Row]:
    """The rows that measure frskd_fast."""
    return [row for row in document["rows"] if is_ours(row["implementation"])]


def failures(document: Document) -> list[Row]:
    """Rows of ours that are wrong, broke or are slower than those of another commit."""
    return [row for row in of_ours(document) if row["status"] in ("WRONG", "failed", "slower")]


def auto_losses(document: Document) -> list[Row]:
    """Rows in which "auto" takes more than TOLERATED times eager PyTorch's time."""
    return [
        row
        for row in of_ours(document)
        if row["implementation"] == "auto" and row["times_eager"] and row["times_eager"] * TOLERATED < 1.0
    ]


def verdicts(document: Document) -> list[str]:
    """Where ours loses, is wrong or is missing, as sentences."""

    def among(losses: list[Row], rows: list[Row], key: str) -> str:
        listed = "; ".join(f"{row['case']} ({row['implementation']}) {row[key]:.2f}x" for row in losses)
        return f"{len(losses)} of {len(rows)}: {listed}" if losses else f"none of {len(rows)}"

    lines = []
    automatic = [row for row in of_ours(document) if row["implementation"] == "auto" and row["times_eager"]]
    if automatic:
        where = among(auto_losses(document), automatic, "times_eager")
        lines.append(f"auto is more than {TOLERATED - 1:.0%} slower than eager PyTorch in {where}.")
    for key, name in (("times_compile", "torch.compile"), ("times_eager", "eager PyTorch")):
        forced = [row for row in of_ours(document) if row["implementation"] != "auto" and row[key]]
        losses = [row for row in forced if round(row[key], 2) < 1.0]
        if forced:
            lines.append(f"Forced implementations are slower than {name} in {among(losses, forced, key)}.")
    bad = [f"{row['case']} ({row['implementation']}): {row['status']}; {row['note']}" for row in failures(document)]
    return [*lines, f"Wrong or failed: {'; '.join(bad)}."] if bad else lines
