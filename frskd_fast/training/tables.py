"""CSV files of a run, whole after a kill and on a full disk."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from frskd_fast.models.checkpoints import brief

from .checkpoints import write_atomically
from .errors import Refusal


class Table:
    """A CSV file that rows are appended to, one flush each; columns may be added later.

    What a kill leaves behind is mended when the file is opened again: a torn last line is dropped, and so are the rows
    that the restarted run is going to write once more. Rows that a full disk refuses wait for the next one.

    Args:
        path: the file.
        position: name of the column that counts rows upwards.
        keep_below: keep the rows of an existing file whose `position` is below this number; 0 starts anew.

    Example:
        >>> import tempfile
        >>> table = Table(Path(tempfile.mkdtemp()) / "steps.csv", "step", 0)
        >>> table.append({"step": 0, "loss": 0.5})
        >>> print(table.path.read_text(), end="")
        step,loss
        0,0.5
    """

    def __init__(self, path: Path, position: str, keep_below: int) -> None:
        self.path = path
        self.columns: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self.refused = False
        kept = []
        if keep_below > 0 and path.is_file():
            self.columns, rows = read_table(path, position)
            kept = [row for row in rows if int(row[position]) < keep_below]
        elif path.is_file():
            path.unlink()
        if kept:
            self._rewrite(kept)
        else:
            self.columns = []

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. Never raises because of a full disk: one warning, and the row is kept for later."""
        self.waiting.append(row)
        try:
            new = [name for waiting in self.waiting for name in waiting if name not in self.columns]
            if new:
                _, rows = read_table(self.path) if self.path.is_file() else ([], [])
                self.columns += list(dict.fromkeys(new))
                self._rewrite([*rows, *self.waiting])
            else:
                text = self._lines(self.waiting)
                size = self.path.stat().st_size
                try:
                    with open(self.path, "ab", buffering=0) as file:
                        content = text.encode()
                        if file.write(content) != len(content):
                            raise OSError("only a part of a row could be written")
                except OSError:
                    os.truncate(self.path, size)
                    raise
            self.waiting.clear()
            self.refused = False
        except OSError as error:
            if not self.refused:
                rank_zero_warn(f"{self.path} could not be written ({error}); its rows wait for the next attempt.")
            self.refused = True

    def _lines(self, rows: Sequence[dict[str, Any]]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n").writerows(rows)
        return buffer.getvalue()

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (",".join(self.columns) + "\n" + self._lines(rows)).encode())


def read_table(path: str | os.PathLike[str], position: str | None = None) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file of a run; a torn last line is left out.

    Args:
        path: the file.
        position: name of a column that holds whole numbers.

    Raises:
        Refusal: when the file is damaged.
    """
    try:
        whole, _, _ = Path(path).read_text(encoding="utf-8").rpartition("\n")
        reader = csv.DictReader(io.StringIO(whole))
        rows = [row for row in reader if None not in row and None not in row.values()]
        for row in rows if position is not None else ():
            int(row[position])
    except (UnicodeDecodeError, csv.Error, KeyError, ValueError) as error:
        raise Refusal(
            f"{path} is damaged ({brief(error)}). Mend it or move it away; then the same command goes on."
        ) from error
    return list(reader.fieldnames or []), rows
