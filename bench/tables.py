"""Tables of result files, for a terminal and in markdown; nothing here is measured or typed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.results import Document, Row, by_case, verdicts

MISSING = "-"


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with about `digits` significant digits and no exponent."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, digits)}f}"


def spread(quartiles: Sequence[float] | None) -> str:
    """The quartiles of the runs."""
    return "..".join(map(significant, quartiles)) if quartiles else MISSING


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
    return significant(value / 1e6) if value else MISSING


def remark(row: Row) -> str:
    """What has to be said beside the figures."""
    return "; ".join(filter(None, (row["status"].removeprefix("ok"), row["note"])))


def implementation(row: Row) -> str:
    """Its name, and what "auto" ran."""
    return f"{row['implementation']} ({row['picked']})" if row["picked"] else str(row["implementation"])


# A column without a figure in any row of a table is left out.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("implementation", implementation),
    ("median ms", lambda row: significant(row["ms"])),
    ("quartiles", lambda row: spread(row["ms_quartiles"])),
    ("vs eager", lambda row: ratio(row["times_eager"])),
    ("vs compile", lambda row: ratio(row["times_compile"])),
    ("vs float32", lambda row: ratio(row["times_float32"])),
    ("vs shipped", lambda row: ratio(row["times_shipped"])),
    ("of plain", lambda row: ratio(row["of_plain"])),
    ("images/s", lambda row: significant(row["images_per_second"])),
    ("must move MB", lambda row: megabytes(row["bytes_moved"])),
    ("GB/s", lambda row: significant(row["gigabytes_per_second"])),
    ("% of copy", lambda row: significant(row["percent_of_copy"], 2)),
    ("extra MB", lambda row: megabytes(row["extra_bytes"])),
    ("saved MB", lambda row: megabytes(row["saved_bytes"])),
    ("host us", lambda row: significant(row["host_us"])),
    ("compile s", lambda row: significant(row["compile_seconds"], 2)),
    ("loss error", lambda row: error(row["loss_error"])),
    ("gradient error", lambda row: error(row["gradient_error"])),
    ("remark", remark),
)

LEGEND = (
    "vs eager, vs compile: how many times faster than that baseline (below 1: slower); eager is the original's order "
    "of operations in the inputs' dtype, compile is torch.compile of that function, auto is what the library picks by "
    "itself. vs float32: how many times faster "
    "than our own run of the case in float32, timed once more in the same rounds (below 1: half precision is slower). "
    "Runs of the implementations are interleaved; quartiles are those of single runs. GB/s: what must move / median. "
    "must move: each gradient written once; each input read once, features that backward needs twice. % of copy: of "
    "the bandwidth of Tensor.copy_ (read + write) measured beside each case; data that stays in the cache can pass "
    "100. extra MB: highest allocation of one call, gradients included. host us: on a CPU a call on tiny tensors, on "
    "a GPU until the call returns. Errors are against float64, relative to the largest true value."
)

NETWORK_LEGEND = (
    "self_teacher, step: must move counts what our order of operations reads and writes once (docs/performance.md); bf16 is "
    "autocast; vs shipped: how many times faster than eager in fp32 NCHW; saved MB: what forward keeps for backward, each "
    "storage once, without parameters and batch. The gradients' error is ||error|| / ||truth|| of all of them as one vector: "
    "in a network a rounding across the kink of a ReLU removes a whole term, in bf16 of the original's gradient, too. Ours may "
    "err a few times as much as the original does, and must agree with it in float64."
)

STEP_LEGEND = (
    "A step is forward, loss and backward without the optimiser, which costs all rows the same. plain is training by "
    "cross-entropy without distillation; of plain: this time / that of plain, eager, in the same dtype and layout."
)


def brief(row: Any) -> str:
    """One row while the benchmark runs: its name and its time, or why it has none."""
    return f"{row.implementation} {row.status if row.ms is None else significant(row.ms) + ' ms'}"


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


def columns_of(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> list[tuple[str, Callable[[Row], str]]]:
    """The columns that say something about these rows."""
    return [
        (title, column)
        for title, column in COLUMNS
        if title not in leave_out and any(column(row) not in ("", MISSING) for row in rows)
    ]


def legends(document: Document) -> list[str]:
    """What the columns mean, for the tables that are there."""
    suites = {row["suite"] for row in document["rows"]}
    shown = {
        LEGEND: bool(suites),
        NETWORK_LEGEND: bool(suites & {"self_teacher", "step"}),
        STEP_LEGEND: "step" in suites,
    }
    return [legend for legend, there in shown.items() if there]


def text(document: Document) -> str:
    """The tables for a terminal: a title for each case, aligned columns."""
    out = [*header(document), ""]
    for suite in dict.fromkeys(row["suite"] for row in document["rows"]):
        out += aligned([row for row in document["rows"] if row["suite"] == suite])
    return "\n".join([*out, *verdicts(document), "", *legends(document)])


def aligned(rows: Sequence[Row]) -> list[str]:
    """Lines of a table for each case of a suite; the bytes are the same for all rows of a case and stand in its title."""
    columns = columns_of(rows, leave_out=["must move MB"])
    titles = [title for title, _ in columns]
    groups = by_case(rows)
    cells = [[[column(row) for _, column in columns] for row in group] for _, group in groups]
    widths = [max(map(len, values)) for values in zip(titles, *itertools.chain(*cells), strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.ljust(width) if title in ("implementation", "remark") else value.rjust(width)
            for title, value, width in zip(titles, values, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    out = []
    for (name, group), table in zip(groups, cells, strict=True):
        moved = f", must move {megabytes(group[0]['bytes_moved'])} MB" if group[0]["bytes_moved"] else ""
        out += [f"{name}{moved}", line(titles), *map(line, table), ""]
    return out


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> list[str]:
    """A markdown table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if index < numbers_from else "---:" for index in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def markdown(document: Document) -> str:
    """Every row of the document, one table for each suite."""
    out = [f"- {line}" for line in header(document)]
    for suite in dict.fromkeys(row["suite"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["suite"] == suite]
        columns = columns_of(rows)
        lines = [[row["case"].removeprefix(f"{suite} "), *(column(row) for _, column in columns)] for row in rows]
        titles = ["case", *(title for title, _ in columns)]
        out += ["", f"## {suite}", "", *markdown_table(titles, lines, numbers_from=2)]
    return "\n".join([*out, "", *(f"- {line}" for line in verdicts(document))])
