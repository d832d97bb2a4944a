"""Plots of result files: times relative to eager PyTorch, and where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.results import Document, by_case
from bench.tables import ratio, significant

# student, three parts of the self-teacher, loss
PART_COLOURS = ("#9aa5b1", "#2a6f97", "#61a5c2", "#a9d6e5", "#e07a5f")


def plot(document: Document, path: Path) -> None:
    """A bar for each case and implementation: median time relative to eager, lines to the quartiles, labelled in ms.

    A case without eager is relative to its first implementation.
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
    """A figure of this height in inches, and its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib, which is not installed: pip install matplotlib.") from None
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plot_steps(document: Document, path: Path) -> None:
    """A stacked bar for each setting and row with a breakdown: where the time of a training step goes."""
    rows = [row for row in document["rows"] if row["parts_ms"]]
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
            f"{significant(row['ms'])} ms ({ratio(row['of_plain'])} of plain)",
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
    """Draw the cases to `path`, and beside it where a step's time goes, if the run took steps apart; the files written."""
    written = [path]
    plot(document, path)
    if any(row["parts_ms"] for row in document["rows"]):
        written.append(path.with_stem(f"{path.stem}-step"))
        plot_steps(document, written[-1])
    return written
