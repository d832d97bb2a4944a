"""Looks for broken promises at random: `make campaign`, or `python scripts/campaign.py --minutes 30 --seed 0`.

First calls of every public function and loss, against the reference in float64; then runs of the trainer that are killed at
random moments. Each finding is printed with the command that repeats it; a table comes at the end, and the exit status is
the answer. docs/reliability.md says what is promised; --docs writes the table there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- campaign:begin -->", "<!-- campaign:end -->"
BATCH = 2000  # calls of one process
HANGS_S = 300  # seconds that one call may take
SHARE_OF_CALLS = 0.6  # of the time
Table = dict[str, "Counter[str]"]


def lines_of(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """What a process with calls writes; at the end how it died, if it did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", "campaign.calls", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None and running.stderr is not None
    said: list[str] = []
    listening = threading.Thread(target=lambda: said.extend(running.stderr or ()))
    listening.start()
    while True:
        watch = threading.Timer(HANGS_S, running.kill)
        watch.start()
        line = running.stdout.readline()
        watch.cancel()
        if not line:
            break
        yield json.loads(line)
    status = running.wait()
    listening.join()
    if status != 0:
        yield {"died": status, "text": "".join(said)[-2000:]}


def calls(seed: int, seconds: float, most: int | None, implementation: str) -> tuple[Table, list[str]]:
    """Make random calls until time is over, or so many of them."""
    table: Table = defaultdict(Counter)
    findings: list[str] = []
    deadline, first = time.monotonic() + seconds, 0
    while time.monotonic() < deadline and (most is None or first < most):
        count = BATCH if most is None else min(BATCH, most - first)
        left = max(deadline - time.monotonic(), 1.0)
        arguments = [f"--seed={seed}", f"--first={first}", f"--count={count}", f"--seconds={left:.0f}"]
        last: dict[str, Any] = {}
        done = first
        for line in lines_of([*arguments, f"--impl={implementation}"]):
            if "begin" in line:
                last, done = line, line["begin"] + 1
                continue
            name = line.get("name") or last.get("source", "the campaign itself")
            outcome = "finding" if "died" in line else line["outcome"]
            table[name][outcome] += 1
            if outcome == "finding":
                text, again = (
                    line["text"],
                    f"python scripts/campaign.py --repeat {last.get('source')!r} {last.get('seed')}",
                )
                if "died" in line:
                    text = f"the process ends with {line['died']}: a crash, or {HANGS_S} s in one call. {text}"
                if line.get("without"):
                    again += f" --without {','.join(line['without'])}"
                findings.append("\n".join(filter(None, (f"{name}: {text}", line.get("call"), f"  {again}"))))
                print(f"FINDING {findings[-1]}", flush=True)
        if done == first:
            break
        first = done
    return table, findings


def kills(seed: int, seconds: float, most: int | None, only: str | None) -> tuple[Table, list[str]]:
    """Kill runs of the recipes in turns until time is over, or so many of them."""
    from campaign.kills import recipes, trial

    table: Table = defaultdict(Counter)
    findings: list[str] = []
    names = [only] if only is not None else recipes()
    deadline, number = time.monotonic() + seconds, seed
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        while time.monotonic() < deadline and (most is None or number < seed + most):
            outcome = trial(number, names[number % len(names)], Path(folder))
            table[outcome.recipe]["runs"] += 1
            table[outcome.recipe]["kills"] += outcome.kills
            if outcome.finding:
                table[outcome.recipe]["finding"] += 1
                again = f"python scripts/campaign.py --kill {outcome.recipe} --seed {number}"
                findings.append(f"{outcome.recipe}: {outcome.finding}\n  {again}")
                print(f"FINDING {findings[-1]}", flush=True)
            number += 1
    return table, findings


def report(of_calls: Table, of_kills: Table, about: str) -> str:
    """The tables, in Markdown."""
    lines = [about, ""]
    if of_calls:
        lines += [
            "| function or loss | calls | compared | refused in a sentence | findings |",
            "| --- | --: | --: | --: | --: |",
        ]
        total: Counter[str] = Counter()
        for name, row in sorted(of_calls.items()):
            total.update(row)
            lines.append(_row(f"`{name}`", row.total(), row["result"], row["refused"], row["finding"]))
        lines.append(_row("all", total.total(), total["result"], total["refused"], total["finding"]))
    if of_kills:
        lines += [""] * bool(of_calls)
        lines += ["| recipe | runs | kills | findings |", "| --- | --: | --: | --: |"]
        total = Counter()
        for name, row in sorted(of_kills.items()):
            total.update(row)
            lines.append(_row(f"`{name}`", row["runs"], row["kills"], row["finding"]))
        lines.append(_row("all", total["runs"], total["kills"], total["finding"]))
    return "\n".join(lines)


def _row(name: str, *numbers: int) -> str:
    return f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |"


def write_page(text: str) -> None:
    """Put the table between the markers of docs/reliability.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long, calls and kills together")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--only", choices=("calls", "kills"), help="one part alone")
    parser.add_argument("--most", type=int, help="calls and runs at most, in each part")
    parser.add_argument("--impl", default="cpu", help="the implementation under test")
    parser.add_argument("--repeat", nargs=2, metavar=("SOURCE", "SEED"), help="repeat one call, as a finding says")
    parser.add_argument("--without", default="", help="changes that are left out of it, with commas between them")
    parser.add_argument("--kill", metavar="RECIPE", help="repeat one killed run, of --seed")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args(arguments)
    if given.repeat is not None:
        from campaign.calls import repeat

        source, seed = given.repeat
        return repeat(source, int(seed), tuple(filter(None, given.without.split(","))), given.impl)
    seconds = 60 * given.minutes
    of_calls: Table = {}
    of_kills: Table = {}
    findings: list[str] = []
    if given.kill is None and given.only != "kills":
        share = SHARE_OF_CALLS if given.only is None else 1.0
        of_calls, findings = calls(given.seed, share * seconds, given.most, given.impl)
    if given.only != "calls":
        share = 1 - SHARE_OF_CALLS if given.only is None and given.kill is None else 1.0
        most = 1 if given.kill is not None else given.most
        of_kills, more = kills(given.seed, share * seconds, most, given.kill)
        findings += more
    import torch

    made = sum(row.total() for row in of_calls.values())
    killed = sum(row["kills"] for row in of_kills.values())
    about = (
        f"`scripts/campaign.py --minutes {given.minutes:g} --seed {given.seed}`, PyTorch {torch.__version__}, "
        f"{platform.machine()}, implementation `{given.impl}`: {made:,} calls, {killed} kills, "
        f"{len(findings)} findings."
    )
    text = report(of_calls, of_kills, about)
    print(text)
    if given.docs:
        write_page(text)
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
