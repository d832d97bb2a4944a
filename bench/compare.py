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
from pathlib import Path
from typing import Any

from bench.machine import warm_environment
from bench.names import is_ours
from bench.results import TOLERATED, Document, Row
from bench.tables import MISSING, padded, significant, spread
from bench.timing import quartiles

TURN_SECONDS = 0.05  # of one side, in as many calls as that takes
FEWEST_ROUNDS, MOST_ROUNDS = 7, 40
# Threads of the side that was timed last may still spin, waiting for work.
PAUSE_SECONDS = 0.02
SIDES = ("base", "this")


class Refused(Exception):
    """One side could not do what it was asked; the sentence says why."""


class Side:
    """A process that imports the frskd_fast in the folder `library`.

    Raises:
        ValueError: a sentence, where it imports another one or dies.
    """

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
        """The answer to one request.

        Raises:
            Refused: where that raised an exception there.
            ValueError: where the process has ended.
        """
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
class Compared:
    """One implementation of one case on both sides."""

    suite: str
    case: str
    implementation: str
    status: str = "ok"  # ok | slower | unclear | not compared | WRONG, failed: this side's
    note: str = ""
    picked: dict[str, str] = field(default_factory=dict)  # side -> what "auto" ran
    same_bits: bool | None = None
    ms: float | None = None
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
        self.ratio, self.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
        first = self.ratio_quartiles[0] if self.ratio_quartiles else self.ratio
        self.status = "ok" if self.ratio <= TOLERATED else "slower" if first > 1.0 else "unclear"


def prepared(number: int, sides: dict[str, Side]) -> dict[str, Compared]:
    """Check a case on both sides; the rows that both can be timed on have the status "ok"."""
    rows, answers = {}, {}
    for name, side in sides.items():
        try:
            answers[name] = side.ask("prepare", case=number)
        except Refused as refusal:
            case, status = side.cases[number], "failed" if name == "this" else "not compared"
            return {"all": Compared(case.split()[0], case, "all", status, f"{name}: {refusal}")}
    for name, of_this in answers["this"]["rows"].items():
        if not is_ours(name):
            continue
        of_base = answers["base"]["rows"][name]
        row = rows[name] = Compared(of_this["suite"], of_this["case"], name)
        row.picked = {side: answer["rows"][name]["picked"] for side, answer in answers.items() if name == "auto"}
        if of_this["status"] != "ok":
            row.status = of_this["status"] if of_this["status"] in ("WRONG", "failed") else "not compared"
            row.note = of_this["note"]
        elif of_base["status"] != "ok":
            row.status, row.note = "not compared", f"base: {of_base['status']}; {of_base['note']}"
        elif answers["base"]["inputs"] != answers["this"]["inputs"]:
            row.status, row.note = "not compared", "the two sides made different inputs"
        else:
            row.same_bits = answers["base"]["bits"][name] == answers["this"]["bits"][name]
    return rows


def alternate(row: Compared, sides: dict[str, Side], target_seconds: float, repeats: int | None) -> None:
    """Time a row on both sides, in turns."""

    def turn() -> tuple[float, float]:
        found = []
        for name in SIDES:
            time.sleep(PAUSE_SECONDS)
            found.append(float(sides[name].ask("turn", implementation=row.implementation, seconds=TURN_SECONDS)))
        return found[0], found[1]

    seconds = max(TURN_SECONDS, max(turn()) / 1e3)
    rounds = repeats or max(FEWEST_ROUNDS, min(MOST_ROUNDS, round(target_seconds / seconds)))
    row.pairs += [turn() for _ in range(rounds)]
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

    Raises:
        ValueError: a sentence, where a side does not start, imports the wrong package or dies.
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
                found = prepared(number, sides)
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


def failures(document: Document) -> list[Row]:
    """Rows in which this commit is slower than the base, wrong or broken."""
    return [row for row in document["rows"] if row["status"] in ("slower", "WRONG", "failed")]


def text(document: Document) -> str:
    """The table for a terminal."""
    lines = [["case", "implementation", "base ms", "this ms", "this / base", "quartiles", "bits", "remark"]]
    for row in document["rows"]:
        differ = len(set(row["picked"].values())) > 1
        picked = "; ".join(f"{side} picked {name}" for side, name in row["picked"].items()) if differ else ""
        lines.append(
            [
                row["case"], row["implementation"], significant(row["base_ms"]), significant(row["ms"]),
                decimals(row["ratio"]), spread(row["ratio_quartiles"]),
                {None: MISSING, True: "same", False: "differ"}[row["same_bits"]],
                "; ".join(filter(None, (row["status"].removeprefix("ok"), row["note"], picked))),
            ]
        )  # fmt: skip
    timed = [row for row in document["rows"] if row["ratio"] is not None]
    slower, unclear = ([row for row in timed if row["status"] == status] for status in ("slower", "unclear"))
    middle = decimals(statistics.median(row["ratio"] for row in timed) if timed else None)
    return "\n".join(
        [
            *padded(lines),
            "",
            f"this: commit {document['environment']['commit'][:12]}; base: commit {document['base'][:12]}; this / base: "
            "median of the rounds' ratios, below 1: this commit is faster.",
            f"More than {TOLERATED - 1:.0%} slower than the base, and by more than the spread: {len(slower)} of {len(timed)} "
            f"rows; by less than the spread (unclear): {len(unclear)}. Median over all rows: {middle}.",
        ]
    )


def decimals(ratio: float | None) -> str:
    """A ratio to a tenth of a per cent."""
    return MISSING if ratio is None else f"{ratio:.3f}"
