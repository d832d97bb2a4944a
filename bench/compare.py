"""Compares this commit with another: `python bench/run.py --base COMMIT [SUITE ...]`.

Each side is a process of its own that imports its own frskd_fast; this commit's bench drives both with the same inputs. They
take strict turns, base, this, base, this, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure, tables, timing
from bench.machine import warm_environment
from bench.names import is_ours
from bench.results import TOLERATED, Document, Row

TURN_SECONDS = 0.05  # of one side, in as many calls as that takes
FEWEST_ROUNDS, MOST_ROUNDS = 7, 40
# Threads of the side that was timed last may still spin, waiting for work.
PAUSE_SECONDS = 0.02
SIDES = ("base", "this")


class Refused(Exception):
    """One side could not do what it was asked; the sentence says why."""


class Side:
    """A process that imports the frskd_fast in the folder `library`."""

    def __init__(self, name: str, library: Path, warm: bool, **start: Any) -> None:
        self.name = name
        environment = warm_environment() if warm else dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(library), environment.get("PYTHONPATH")]))
        command = [sys.executable, "-P", str(Path(__file__).with_name("compare_worker.py"))]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        started = self.ask("start", **start)
        self.cases: list[str] = started["cases"]
        if not Path(started["package"]).is_relative_to(library):
            self.close()
            raise ValueError(f"the side {name} imported {started['package']} instead of the package in {library}.")

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ValueError(
                f"the side {self.name} ended at {what!r}, status {self.process.wait()}; its error stands above."
            )
        found = json.loads(answer)
        if "error" in found:
            raise Refused(found["error"])
        return found["is"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Compared(measure.Row):
    """This side's row of one implementation of one case, and the base beside it.

    Its status may also be slower, unclear (perhaps slower) or not compared.
    """

    base_picked: str = ""
    same_bits: bool | None = None
    base_ms: float | None = None
    ratio: float | None = None  # median of this / base over the rounds
    ratio_quartiles: tuple[float, float] | None = None
    pairs: list[tuple[float, float]] = field(default_factory=list)  # milliseconds of base and this, a round each

    def judge(self) -> None:
        """Fill in the figures from the pairs.

        Slower: by more than TOLERATED, and by more than the spread, so that three quarters of the rounds say so. Unclear: the
        first alone.
        """
        ratios = [this / base for base, this in self.pairs]
        self.base_ms, self.ms = (statistics.median(side) for side in zip(*self.pairs, strict=True))
        self.ratio, self.ratio_quartiles = statistics.median(ratios), timing.quartiles(ratios)
        first = self.ratio_quartiles[0] if self.ratio_quartiles else self.ratio
        self.status = "ok" if self.ratio <= TOLERATED else "slower" if first > 1.0 else "unclear"


def prepared(number: int, sides: dict[str, Side], implementations: Sequence[str]) -> dict[str, Compared]:
    """Check a case on both sides; the rows that both can be timed on have the status "ok"."""
    rows, answers = {}, {}
    for side_name, side in sides.items():
        try:
            answers[side_name] = side.ask("prepare", case=number)
        except Refused as refusal:
            case, status = side.cases[number], "failed" if side_name == "this" else "not compared"
            suite, note = case.split()[0], f"{side_name}: {refusal}"
            return {
                name: Compared(suite, case, "", "", "", "", name, 0, status=status, note=note)
                for name in implementations
            }
    for name, of_this in answers["this"]["rows"].items():
        if not is_ours(name):
            continue
        of_base = answers["base"]["rows"][name]
        row = rows[name] = Compared(**of_this, base_picked=of_base["picked"])
        if row.status in ("WRONG", "failed"):
            continue
        if row.status != "ok":
            row.status = "not compared"
        elif of_base["status"] != "ok":
            row.status, row.note = "not compared", f"base: {of_base['status']}; {of_base['note']}"
        elif answers["base"]["inputs"] != answers["this"]["inputs"]:
            row.status, row.note = "not compared", "the two sides made different inputs"
        else:
            row.same_bits = answers["base"]["bits"][name] == answers["this"]["bits"][name]
    return rows


def alternate(row: Compared, sides: dict[str, Side], target_seconds: float, repeats: int | None) -> None:
    """Time a row on both sides, in turns."""

    def turn(side: str) -> float:
        time.sleep(PAUSE_SECONDS)
        return float(sides[side].ask("turn", implementation=row.implementation, seconds=TURN_SECONDS))

    turns = {side: partial(turn, side) for side in SIDES}
    seconds = max(TURN_SECONDS, *(turn(side) / 1e3 for side in SIDES))
    rounds = repeats or timing.rounds_within(target_seconds, seconds, FEWEST_ROUNDS, MOST_ROUNDS)
    # Always the base first: a side that came twice in a row would find its caches warm the second time.
    row.pairs += zip(*timing.take_turns(turns, rounds, rotate=False).values(), strict=True)
    row.judge()


def compare(
    libraries: dict[str, Path],
    selection: Any,
    suites: Sequence[str],
    implementations: Sequence[str],
    *,
    warm: bool,
    threads: int = 0,
    target_seconds: float = 1.0,
    repeats: int | None = None,
) -> list[Row]:
    """Rows of every case; those that come out slower are measured once more, by fresh processes, and all rounds count.

    Where a process's memory happens to lie makes a few per cent that no number of rounds in it shows.
    """
    arguments = {"selection": dataclasses.asdict(selection), "suites": list(suites), "threads": threads}
    rows: dict[int, dict[str, Compared]] = {}
    for again in (False, True):
        suspects = [number for number, of_case in rows.items() if any(map(doubtful, of_case.values()))]
        if again and not suspects:
            break
        sides: dict[str, Side] = {}
        try:
            for name in SIDES:
                sides[name] = Side(name, libraries[name], warm, implementations=list(implementations), **arguments)
            cases = sides["this"].cases
            for number in suspects if again else range(len(cases)):
                label = "again" if again else f"{number + 1}/{len(cases)}"
                print(f"[{label}] {cases[number]} ... ", end="", flush=True)
                found = prepared(number, sides, implementations)
                for name, row in found.items():
                    earlier = rows.get(number, {}).get(name)
                    if row.status != "ok" or (earlier is not None and not doubtful(earlier)):
                        continue
                    row.pairs = list(earlier.pairs) if earlier is not None else []
                    try:
                        alternate(row, sides, target_seconds, repeats)
                    except Refused as refusal:
                        row.status, row.note = "failed", str(refusal)
                    rows.setdefault(number, {})[name] = row
                rows[number] = {**found, **rows.get(number, {})}
                print(", ".join(map(brief, rows[number].values())), flush=True)
        finally:
            for side in sides.values():
                side.close()
    return [dataclasses.asdict(row) for of_case in rows.values() for row in of_case.values()]


def doubtful(row: Compared) -> bool:
    """Whether a second look could change what is said of this row."""
    return row.status in ("slower", "unclear")


def brief(row: Compared) -> str:
    """A row while the comparison runs."""
    return f"{row.implementation} {row.status if row.ratio is None else decimals(row.ratio)}"


def remark(row: Row) -> str:
    """What has to be said beside the figures."""
    other = f"base picked {row['base_picked']}" if row["base_picked"] != row["picked"] else ""
    return "; ".join(filter(None, (tables.remark(row), other)))


COLUMNS: tuple[tables.Column, ...] = (
    ("case", lambda row: str(row["case"]), ""),
    ("implementation", tables.implementation, ""),
    ("base ms", lambda row: tables.significant(row["base_ms"]), ""),
    ("this ms", lambda row: tables.significant(row["ms"]), ""),
    ("this / base", lambda row: decimals(row["ratio"]), ""),
    ("quartiles", lambda row: tables.spread(row["ratio_quartiles"]), ""),
    ("bits", lambda row: {None: tables.MISSING, True: "same", False: "differ"}[row["same_bits"]], ""),
    ("remark", remark, ""),
)


def text(document: Document) -> str:
    """The table for a terminal."""
    timed = [row for row in document["rows"] if row["ratio"] is not None]
    slower, unclear = ([row for row in timed if row["status"] == status] for status in ("slower", "unclear"))
    middle = decimals(statistics.median(row["ratio"] for row in timed) if timed else None)
    return "\n".join(
        [
            *tables.padded(tables.cells(COLUMNS, document["rows"])),
            "",
            f"this: commit {document['environment']['commit'][:12]}; base: commit {document['base'][:12]}; this / base: "
            "median of the rounds' ratios, below 1: this commit is faster.",
            f"More than {TOLERATED - 1:.0%} slower than the base, and by more than the spread: {len(slower)} of {len(timed)} "
            f"rows; by less than the spread (unclear): {len(unclear)}. Median over all rows: {middle}.",
        ]
    )


def decimals(ratio: float | None) -> str:
    """A ratio to a tenth of a per cent."""
    return tables.MISSING if ratio is None else f"{ratio:.3f}"
