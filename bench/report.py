"""Tables and plots from the results of bench/run.py: `python bench/report.py bench/results/X.json --markdown`.

Nothing here is measured or typed: what the README shows between its two markers is generated from JSON files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SOURCE = re.compile(r"<!-- bench:source (\S+) -->")
BASELINES = ("eager", "compile")
MISSING = "-"
# student, three parts of the self-teacher, loss
PART_COLOURS = ("#9aa5b1", "#2a6f97", "#61a5c2", "#a9d6e5", "#e07a5f")

Document = dict[str, Any]
Row = dict[str, Any]


def load(path: Path) -> Document:
    """Read a result file.

    Raises:
        ValueError: when it is not a result of this schema.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path} has schema {found!r}, but {SCHEMA} was wanted; write it anew by bench/run.py --json.")
    return dict(document)


def jsonable(value: Any) -> Any:
    """`value` with NaN and infinities as strings, which strict JSON cannot hold as numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with about `digits` significant digits and no exponent."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, digits)}f}"


def spread(row: Row) -> str:
    """The quartiles of the runs."""
    if not row["ms_quartiles"]:
        return MISSING
    return "..".join(significant(value) for value in row["ms_quartiles"])


def ratio(value: float | None) -> str:
    """How many times faster than a baseline; below 1 is slower."""
    return MISSING if value is None else f"{value:.2f}x"


def error(value: float | str | None) -> str:
    """A relative error; "nan" stays visible."""
    if value is None:
        return MISSING
    return "NaN" if isinstance(value, str) else f"{value:.1e}"


def megabytes(value: float | None) -> str:
    """Bytes in units of 10^6."""
    return MISSING if value is None else significant(value / 1e6)


def extra_megabytes(row: Row) -> str:
    """The highest allocation of one call."""
    return megabytes(row["extra_bytes"])


def gradient_error(row: Row) -> str:
    """The worst relative error of a gradient."""
    return error(row["gradient_error"])


def remark(row: Row) -> str:
    """What has to be said beside the figures."""
    parts = [] if row["status"] == "ok" else [row["status"]]
    if row["note"]:
        parts.append(row["note"])
    if row["compile_seconds"] is not None:
        parts.append(f"compiled in {row['compile_seconds']:.0f} s")
    return "; ".join(parts)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("implementation", lambda row: str(row["implementation"])),
    ("median ms", lambda row: significant(row["ms"])),
    ("quartiles", spread),
    ("vs eager", lambda row: ratio(row["times_eager"])),
    ("vs compile", lambda row: ratio(row["times_compile"])),
    ("vs float32", lambda row: ratio(row.get("times_float32"))),
    ("must move MB", lambda row: megabytes(row["bytes_moved"])),
    ("GB/s", lambda row: significant(row["gigabytes_per_second"])),
    ("% of copy", lambda row: significant(row["percent_of_copy"], 2)),
    ("extra MB", extra_megabytes),
    ("host us", lambda row: significant(row["host_us"])),
    ("loss error", lambda row: error(row["loss_error"])),
    ("gradient error", gradient_error),
    ("remark", remark),
)

LEGEND = (
    "vs eager, vs compile: how many times faster than that baseline (below 1: slower); eager is the original's order "
    "of operations in the inputs' dtype, compile is torch.compile of that function. vs float32: how many times faster "
    "than our own run of the case in float32, timed once more in the same rounds (below 1: half precision is slower). "
    "Runs of the implementations are interleaved; quartiles are those of single runs. GB/s: what must move / median. "
    "must move: each gradient written once; each input read once, features that backward needs twice. % of copy: of "
    "the bandwidth of Tensor.copy_ (read + write) measured beside each case; data that stays in the cache can pass "
    "100. extra MB: highest allocation of one call, gradients included. host us: on a CPU a call on tiny tensors, on "
    "a GPU until the call returns. Errors are against float64, relative to the largest true value."
)


STEP_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("row", lambda row: str(row["implementation"])),
    ("ms", lambda row: significant(row["ms"])),
    ("images/s", lambda row: significant(row["images_per_second"])),
    ("of plain", lambda row: ratio(row["times_plain"])),
    ("vs shipped", lambda row: ratio(row["times_shipped"])),
    ("vs original", lambda row: ratio(row["times_eager"])),
    ("vs compiled original", lambda row: ratio(row["times_compile"])),
    ("saved MB", lambda row: megabytes(row["saved_bytes"])),
    ("peak MB", lambda row: megabytes(row["peak_bytes"])),
    ("compile s", lambda row: significant(row["compile_seconds"], 2)),
    ("loss error", lambda row: error(row["loss_error"])),
    ("gradient error", lambda row: error(row["gradient_error"])),
    ("remark", lambda row: "; ".join(filter(None, (row["status"].removeprefix("ok"), row["note"])))),
)

SELF_TEACHER_LEGEND = (
    "self_teacher: must move counts what our order of operations reads and writes once (docs/performance.md), bf16 is "
    "autocast, and the gradients' error is ||error|| / ||truth|| of all of them as one vector: in a network a rounding "
    "across the kink of a ReLU removes a whole term. Ours must also agree with the original in float64."
)

STEP_LEGEND = (
    "A step is forward, loss and backward without the optimiser, which costs all rows the same. of plain: this time / "
    "that of plain cross-entropy, eager, in the same dtype and layout. vs shipped, vs original, vs compiled original: how "
    "many times faster than the original's order of operations in fp32 NCHW eager, in the same setting, and compiled. "
    "bf16 is autocast. saved MB: what forward keeps for backward, each storage once, without parameters and batch; peak "
    "MB: highest allocation of a step, gradients included. Errors are against float64, of the gradients as one vector: in bf16 "
    "large for the original, too, because a rounding across the kink of a ReLU removes a whole term of an untrained network's "
    "gradient. Ours may err a few times as much as the original does, and must agree with it in float64."
)


def brief(row: Any) -> str:
    """One row while the benchmark runs: its name and its time, or why it has none."""
    return f"{row.implementation} {row.status if row.ms is None else significant(row.ms) + ' ms'}"


def step_rows(document: Document) -> list[Row]:
    """The rows of whole training steps; results from before that suite have none."""
    return list(document.get("steps", []))


def all_rows(document: Document) -> list[Row]:
    """Those of the cases, then those of the steps."""
    return [*document["rows"], *step_rows(document)]


def by_case(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows grouped by case, in the order of the run."""
    return [(name, list(group)) for name, group in itertools.groupby(rows, key=lambda row: str(row["case"]))]


def is_ours(row: Row) -> bool:
    """Whether the row measures frskd_fast."""
    return row["implementation"].removesuffix(" compiled") not in (*BASELINES, "plain", "original")


def failures(document: Document) -> list[Row]:
    """Rows of ours that are wrong or broke."""
    return [row for row in all_rows(document) if is_ours(row) and row["status"] in ("WRONG", "failed")]


def slower(document: Document, baseline: str) -> list[Row]:
    """Rows of ours that lose to `baseline`."""
    ratios = [(row, row[f"times_{baseline}"]) for row in all_rows(document) if is_ours(row)]
    return [row for row, times in ratios if times is not None and round(times, 2) < 1.0]


def verdicts(document: Document) -> list[str]:
    """Where ours loses, is wrong or is missing, as sentences."""
    lines = []
    for baseline, name in (("compile", "torch.compile"), ("eager", "eager PyTorch")):
        compared = [row for row in all_rows(document) if is_ours(row) and row[f"times_{baseline}"]]
        losses = slower(document, baseline)
        if losses:
            key = f"times_{baseline}"
            listed = "; ".join(f"{row['case']} ({row['implementation']}) {ratio(row[key])}" for row in losses)
            lines.append(f"Slower than {name} in {len(losses)} of {len(compared)}: {listed}.")
        elif compared:
            lines.append(f"Slower than {name} in none of {len(compared)}.")
    bad = failures(document)
    if bad:
        listed = "; ".join(f"{row['case']} ({row['implementation']}): {row['status']}; {row['note']}" for row in bad)
        lines.append(f"Wrong or failed: {listed}.")
    return lines


def header(document: Document) -> list[str]:
    """Machine, versions and allocator, a line each."""
    here = document["environment"]
    machine = f"{here['device_name']}, {here['cores']} cores, {here['threads']} threads"
    if here["device"] == "cuda":
        machine = f"{here['device_name']} (CUDA {here['cuda']}), host {here['cpu']}, {here['threads']} threads"
    settings = " ".join(f"{name}={value}" for name, value in document["allocator"]["settings"].items())
    lines = [
        f"Device: {machine}; {here['system']}",
        f"Versions: torch {here['torch']}, triton {here['triton']}, Python {here['python']}, "
        f"frskd_fast {here['frskd_fast']}, commit {here['commit'][:12]}; {document['date']}",
        f"Host allocator: {document['allocator']['mode']}" + (f" ({settings})" if settings else ""),
    ]
    busy = document.get("others_busy_cores")
    if busy is not None:
        advice = "; times taken beside other work are not to be trusted" if busy > 0.1 else ""
        lines.append(f"Other processes: {busy:.1f} of {here['cores']} cores busy (median over the cases){advice}")
    if document.get("copy_gigabytes_per_second"):
        lines.append(f"Copy bandwidth: {significant(document['copy_gigabytes_per_second'])} GB/s, read + write")
    if document.get("inputs"):
        lines.append(f"Inputs: {document['inputs']}")
    return lines


def text(document: Document) -> str:
    """The tables for a terminal: a title for each case, aligned columns."""
    out = [*header(document), ""]
    if document["rows"]:
        # The bytes are the same for all rows of a case and stand in its title.
        shown = [column for column in COLUMNS if column[0] != "must move MB"]
        out += aligned(document["rows"], shown, lambda row: f", must move {megabytes(row['bytes_moved'])} MB")
    out += aligned(step_rows(document), STEP_COLUMNS, lambda row: "")
    out += [*verdicts(document), "", *legends(document)]
    return "\n".join(out)


def aligned(
    rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]], more: Callable[[Row], str]
) -> list[str]:
    """Lines of a table for each case; `more` is what its title says of the case behind its name."""
    titles = [title for title, _ in columns]
    groups = by_case(rows)
    cells = [[[column(row) for _, column in columns] for row in group] for _, group in groups]
    widths = [max(map(len, values)) for values in zip(titles, *itertools.chain(*cells), strict=True)]
    left = {0, titles.index("remark")}

    def line(values: Sequence[str]) -> str:
        padded = (
            value.ljust(width) if index in left else value.rjust(width)
            for index, (value, width) in enumerate(zip(values, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    out = []
    for (name, group), table in zip(groups, cells, strict=True):
        out += [f"{name}{more(group[0])}", line(titles), *map(line, table), ""]
    return out


def legends(document: Document) -> list[str]:
    """What the columns mean, for the tables that are there."""
    suites = {row["suite"] for row in all_rows(document)}
    shown = {
        LEGEND: bool(document["rows"]),
        SELF_TEACHER_LEGEND: "self_teacher" in suites,
        STEP_LEGEND: "step" in suites,
    }
    return [legend for legend, there in shown.items() if there]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> list[str]:
    """A markdown table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if index < numbers_from else "---:" for index in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def markdown(document: Document) -> str:
    """Every row of the document, one table for each suite."""
    out = [f"- {line}" for line in header(document)]
    titles = ["case", *(title for title, _ in COLUMNS)]
    for suite in document["suites"]:
        rows = [row for row in document["rows"] if row["suite"] == suite]
        if not rows:
            continue
        lines = [[row["case"].removeprefix(f"{suite} "), *(column(row) for _, column in COLUMNS)] for row in rows]
        out += ["", f"### {suite}", "", *table(titles, lines, numbers_from=2)]
    if step_rows(document):
        out += ["", "### step", "", *step_table(document)]
    out += ["", *(f"- {line}" for line in verdicts(document)), ""]
    for legend in legends(document):
        out += [legend, ""]
    return "\n".join(out)


def step_table(document: Document) -> list[str]:
    """A markdown table of whole training steps, the setting in the first column."""
    # A remark only where there is one, and compilation where something was compiled.
    rows = step_rows(document)
    columns = [
        (title, column)
        for title, column in STEP_COLUMNS
        if title not in ("remark", "compile s") or any(column(row) not in ("", MISSING) for row in rows)
    ]
    lines = [[row["case"].removeprefix("step "), *(column(row) for _, column in columns)] for row in rows]
    return table(["setting", *(title for title, _ in columns)], lines, numbers_from=2)


def summary(document: Document) -> list[str]:
    """One line for each case and implementation of ours beside both baselines, for the README."""
    titles = [
        "case", "implementation", "ms", "eager ms", "compile ms", "vs eager", "vs compile", "vs float32", "GB/s", "% of copy",
        "extra MB (eager)", "gradient error (eager)", "host us",
    ]  # fmt: skip
    out: list[str] = []
    for suite in document["suites"]:
        lines = []
        for name, rows in by_case(row for row in document["rows"] if row["suite"] == suite):
            baselines = {row["implementation"]: row for row in rows if not is_ours(row)}

            def of(baseline: str, show: Callable[[Row], str], known: dict[str, Row] = baselines) -> str:
                return show(known[baseline]) if baseline in known else MISSING

            def marked_ms(row: Row) -> str:
                return significant(row["ms"]) + ("" if row["status"] == "ok" else f" ({row['status']})")

            for row in filter(is_ours, rows):
                lines.append(
                    [
                        name.removeprefix(f"{suite} "),
                        row["implementation"],
                        marked_ms(row),
                        of("eager", marked_ms),
                        of("compile", marked_ms),
                        ratio(row["times_eager"]),
                        ratio(row["times_compile"]),
                        ratio(row.get("times_float32")),
                        significant(row["gigabytes_per_second"]),
                        significant(row["percent_of_copy"], 2),
                        f"{extra_megabytes(row)} ({of('eager', extra_megabytes)})",
                        f"{gradient_error(row)} ({of('eager', gradient_error)})",
                        significant(row["host_us"]),
                    ]
                )
        if lines:
            out += [f"**{suite}**", "", *table(titles, lines, numbers_from=2), ""]
    if step_rows(document):
        out += ["**step**", "", *step_table(document), ""]
    return out


def block(sources: Sequence[tuple[str, Document]]) -> str:
    """What stands in the README between the markers, which it includes."""
    out = [BEGIN]
    for name, document in sources:
        out += [
            f"<!-- bench:source {name} -->",
            *(f"- {line}" for line in header(document)),
            "",
            *summary(document),
            *(f"- {line}" for line in verdicts(document)),
            "",
            f"All rows: [`{name}`]({name}), or `python bench/report.py {name} --markdown`.",
            "",
        ]
    found = dict.fromkeys(legend for _, document in sources for legend in legends(document))
    return "\n".join([*out, "\n\n".join(found), END])


def split(readme: str) -> tuple[str, str, str]:
    """The README before its block, the block with its markers, and what follows.

    Raises:
        ValueError: unless both markers are there once, in their order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} once and then {END} once; add both lines where the tables go.")
    start, stop = readme.index(BEGIN), readme.index(END) + len(END)
    return readme[:start], readme[start:stop], readme[stop:]


def update_readme(readme: Path, results: Sequence[Path], check: bool) -> bool:
    """Rewrite the README's block from `results`, or with `check` only compare; True when it was up to date before.

    Without `results` the files are taken that the block itself names.

    Raises:
        ValueError: on missing markers, or when there is no result file to take.
    """
    content = readme.read_text(encoding="utf-8")
    before, old, after = split(content)
    folder = readme.absolute().parent
    names = [Path(os.path.relpath(path.absolute(), folder)).as_posix() for path in results] or SOURCE.findall(old)
    if not names:
        raise ValueError(f"{readme} names no result file yet; give one, as in bench/report.py bench/results/X.json.")
    new = before + block([(name, load(folder / name)) for name in names]) + after
    if new != content and not check:
        readme.write_text(new, encoding="utf-8")
    return new == content


def plot(document: Document, path: Path) -> None:
    """A bar for each case and implementation: median time relative to eager, lines to the quartiles, labelled in ms.

    A case without eager is relative to its first implementation.

    Raises:
        ValueError: when matplotlib is not installed or nothing was timed.
    """
    timed = [row for row in document["rows"] if row["ms"] is not None]
    if not timed:
        raise ValueError("no row of the results has a time, so there is nothing to plot.")
    groups = by_case(timed)
    implementations = list(dict.fromkeys(row["implementation"] for row in timed))
    height = 0.8 / len(implementations)
    figure, axes = empty_figure(1.5 + 0.25 * len(timed))
    for position, implementation in enumerate(implementations):
        offset = (position - (len(implementations) - 1) / 2) * height
        places, lengths, low, high, labels = [], [], [], [], []
        for index, (_, rows) in enumerate(groups):
            unit = next((row["ms"] for row in rows if row["implementation"] == "eager"), rows[0]["ms"])
            for row in rows:
                if row["implementation"] != implementation:
                    continue
                first, third = row["ms_quartiles"] or (row["ms"], row["ms"])
                places.append(index + offset)
                lengths.append(row["ms"] / unit)
                low.append((row["ms"] - first) / unit)
                high.append((third - row["ms"]) / unit)
                labels.append(f"{significant(row['ms'])} ms" + ("" if row["status"] == "ok" else f" ({row['status']})"))
        bars = axes.barh(places, lengths, height, xerr=(low, high), label=implementation, error_kw={"elinewidth": 0.8})
        axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("median time relative to eager (shorter is faster), lines to the quartiles")
    here = document["environment"]
    axes.set_title(f"{here['device_name']}, torch {here['torch']}, {document['date']}", fontsize=9)
    figure.legend(loc="outside lower right", ncols=len(implementations), fontsize=8)
    figure.savefig(path, dpi=150)


def empty_figure(height: float) -> tuple[Any, Any]:
    """A figure of this height in inches, and its axes.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib, which is not installed: pip install matplotlib.") from None
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plot_steps(document: Document, path: Path) -> None:
    """A stacked bar for each setting and row with a breakdown: where the time of a training step goes.

    Raises:
        ValueError: when matplotlib is not installed or no step was broken down.
    """
    rows = [row for row in step_rows(document) if row.get("parts_ms")]
    if not rows:
        raise ValueError("no step of the results is broken down into parts; run bench/run.py step --plot PATH.png.")
    figure, axes = empty_figure(1.7 + 0.35 * len(rows))
    parts = list(dict.fromkeys(part for row in rows for part in row["parts_ms"]))
    begin = [0.0] * len(rows)
    for position, part in enumerate(parts):
        lengths = [row["parts_ms"].get(part, 0.0) for row in rows]
        bars = axes.barh(
            range(len(rows)), lengths, 0.7, left=begin, label=part, color=PART_COLOURS[position % len(PART_COLOURS)]
        )
        wide = [significant(length) if length > 0.06 * max(row["ms"] for row in rows) else "" for length in lengths]
        axes.bar_label(bars, wide, label_type="center", fontsize=7)
        begin = [start + length for start, length in zip(begin, lengths, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(
            f"{significant(row['ms'])} ms ({ratio(row['times_plain'])} of plain)",
            (begin[place], place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    names = [f"{row['case'].removeprefix('step ')}: {row['implementation']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("median ms of a step (forward, loss, backward), divided as in one profiled step")
    here = document["environment"]
    axes.set_title(f"{here['device_name']}, torch {here['torch']}, {document['date']}", fontsize=9)
    figure.legend(loc="outside lower right", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def plots(document: Document, path: Path) -> list[Path]:
    """Draw the cases to `path` and the steps beside it, or to `path` where there are only steps; the files written."""
    written = []
    if document["rows"] or not step_rows(document):
        plot(document, path)
        written.append(path)
    if any(row.get("parts_ms") for row in step_rows(document)):
        beside = path.with_stem(f"{path.stem}-step") if written else path
        plot_steps(document, beside)
        written.append(beside)
    return written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="bench/report.py", description="Tables and plots from results of run.py.")
    result.add_argument(
        "results", nargs="*", type=Path, metavar="RESULT.json", help="files that bench/run.py --json wrote"
    )
    result.add_argument("--markdown", action="store_true", help="print every row as markdown tables")
    result.add_argument(
        "--readme",
        type=Path,
        metavar="README.md",
        help=f"rewrite what stands between {BEGIN} and {END}, from the files named here or else in that block",
    )
    result.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it is out of date")
    result.add_argument("--plot", type=Path, metavar="PATH.png", help="write a bar plot of the one file named")
    return result


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; 1 if the README is out of date, 2 if something is missing."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    if arguments.check and arguments.readme is None:
        command_line.error("--check compares a README; name it with --readme README.md")
    if not arguments.results and arguments.readme is None:
        command_line.error("name a result file, as in bench/results/X.json")
    if arguments.plot is not None and len(arguments.results) != 1:
        command_line.error(f"--plot draws one result file, but {len(arguments.results)} were named")
    try:
        documents = [load(path) for path in arguments.results]
        if arguments.readme is not None:
            current = update_readme(arguments.readme, arguments.results, arguments.check)
            if arguments.check and not current:
                print(f"{arguments.readme} is out of date; run python bench/report.py --readme {arguments.readme}.")
                return 1
            print(f"{arguments.readme} {'was up to date' if current else 'was rewritten'}.")
        if arguments.plot is not None:
            plots(documents[0], arguments.plot)
    except (OSError, ValueError) as problem:
        print(f"bench/report.py: {problem}", file=sys.stderr)
        return 2
    if arguments.markdown or (arguments.readme is None and arguments.plot is None):
        for document in documents:
            print(markdown(document) if arguments.markdown else text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
