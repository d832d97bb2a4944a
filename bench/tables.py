"""Tables of result files, for a terminal and in markdown; nothing here is measured or typed."""

from __future__ import annotations

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


Column = tuple[str, Callable[[Row], str], str]

# title, cell, meaning ("" where the title says it). A column without a figure in any row of a table is left out.
COLUMNS: tuple[Column, ...] = (
    (
        "implementation",
        implementation,
        "eager: the original's order of operations in the inputs' dtype; compile: torch.compile of that function; auto: what "
        "the library picks by itself (in brackets); others: forced",
    ),
    ("median ms", lambda row: significant(row["ms"]), "the implementations' runs are interleaved"),
    ("quartiles", lambda row: spread(row["ms_quartiles"]), "of single runs"),
    ("vs eager", lambda row: ratio(row["times_eager"]), "how many times faster than eager; below 1 it is slower"),
    ("vs compile", lambda row: ratio(row["times_compile"]), "the same for compile"),
    (
        "vs float32",
        lambda row: ratio(row["times_float32"]),
        "how many times faster than our own run of the case in float32, timed once more in the same rounds",
    ),
    (
        "vs shipped",
        lambda row: ratio(row["times_shipped"]),
        "of a network: how many times faster than eager in fp32 NCHW, as its authors ship it",
    ),
    (
        "of plain",
        lambda row: ratio(row["of_plain"]),
        "of a step: this time / that of plain (the student's cross-entropy on the same images without distillation, eager) in "
        "the same dtype and layout",
    ),
    ("images/s", lambda row: significant(row["images_per_second"]), ""),
    (
        "must move MB",
        lambda row: megabytes(row["bytes_moved"]),
        "each input read once (features that backward needs: twice) and each gradient written once; of the self-teacher what "
        "our order of operations reads and writes once",
    ),
    ("GB/s", lambda row: significant(row["gigabytes_per_second"]), "what must move / median"),
    (
        "% of copy",
        lambda row: significant(row["percent_of_copy"], 2),
        "of the bandwidth of Tensor.copy_ (read + write) measured beside each case; data that stays in the cache can pass 100",
    ),
    ("extra MB", lambda row: megabytes(row["extra_bytes"]), "highest allocation of one call, gradients included"),
    (
        "saved MB",
        lambda row: megabytes(row["saved_bytes"]),
        "what forward keeps for backward, each storage once, without parameters and batch",
    ),
    (
        "host us",
        lambda row: significant(row["host_us"]),
        "on a CPU the time of a call on tiny tensors, on a GPU until the call returns",
    ),
    ("compile s", lambda row: significant(row["compile_seconds"], 2), "the first call of what is compiled"),
    ("loss error", lambda row: error(row["loss_error"]), "against float64, relative to the largest true value"),
    ("gradient error", lambda row: error(row["gradient_error"]), "the worst of a gradient; of a network see below"),
    ("remark", remark, ""),
)

NETWORKS = (
    "Networks (self_teacher, step, steps of methods): bf16 is autocast. The gradients' error is ||error|| / ||truth|| "
    "of all of them as one vector: a rounding across the kink of a ReLU removes a whole term, in bf16 of the "
    "original's gradient, too. Ours may err a few times as much as the original does, and must agree with it in "
    "float64. A step is forward, loss and backward without the optimiser, which costs all rows the same."
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


def columns_of(rows: Sequence[Row], leave_out: Sequence[str] = ()) -> list[Column]:
    """The columns that say something about these rows."""
    return [
        column
        for column in COLUMNS
        if column[0] not in leave_out and any(column[1](row) not in ("", MISSING) for row in rows)
    ]


def cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The titles, then a line for each row."""
    return [[title for title, *_ in columns], *([show(row) for _, show, _ in columns] for row in rows)]


def meanings(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """(title, meaning) of the columns that these documents show and whose title does not say it."""
    rows = [row for document in documents for row in document["rows"]]
    return [(title, meaning) for title, _, meaning in columns_of(rows) if meaning]


def by_suite(document: Document) -> list[tuple[str, list[Row]]]:
    """The rows of each suite, in the order of the run."""
    return [
        (suite, [row for row in document["rows"] if row["suite"] == suite])
        for suite in dict.fromkeys(row["suite"] for row in document["rows"])
    ]


def text(document: Document) -> str:
    """The tables for a terminal: a title for each case, aligned columns."""
    out = [*header(document), "", *(line for _, rows in by_suite(document) for line in aligned(rows))]
    explained = [f"{title}: {meaning}." for title, meaning in meanings([document])]
    return "\n".join([*out, *verdicts(document), "", *explained, NETWORKS])


def padded(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, titles first, with columns of one width: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [title in ("case", "implementation", "remark") for title in lines[0]]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    ]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Lines of a table for each case of a suite; the bytes are the same for all rows of a case and stand in its title."""
    columns = columns_of(rows, leave_out=["must move MB"])
    titles, *lines = padded(cells(columns, rows))
    out = []
    for name, group in by_case(rows):
        moved = f", must move {megabytes(group[0]['bytes_moved'])} MB" if group[0]["bytes_moved"] else ""
        out += [f"{name}{moved}", titles, *(lines.pop(0) for _ in group), ""]
    return out


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> list[str]:
    """A markdown table; columns from `numbers_from` on are aligned to the right."""
    rule = ["---" if index < numbers_from else "---:" for index in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def markdown(document: Document) -> str:
    """Every row of the document, one table for each suite."""
    out = [f"- {line}" for line in header(document)]
    for suite, rows in by_suite(document):
        case = ("case", lambda row: row["case"].removeprefix(f"{row['suite']} "), "")
        titles, *lines = cells([case, *columns_of(rows)], rows)
        out += ["", f"## {suite}", "", *markdown_table(titles, lines, numbers_from=2)]
    return "\n".join([*out, "", *(f"- {line}" for line in verdicts(document))])


def markdown_legend(documents: Sequence[Document]) -> str:
    """What the columns mean."""
    return "\n".join([*markdown_table(["column", "meaning"], meanings(documents), numbers_from=2), "", NETWORKS])
