"""Tables and plots from the results of bench/run.py: `python bench/report.py bench/results/X.json --markdown`.

What the README, docs/benchmarks.md and docs/methods/index.md show between their markers is generated from result files. That
of the last is also from results of scripts/evidence.py, which its block names.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import plots, results, tables
from bench.names import BASELINES, FORCED
from bench.results import Document, Row
from bench.tables import markdown_table, ratio, significant
from scripts import evidence

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SOURCE = re.compile(r"<!-- bench:source (\S+) -->")
# The README's table: what it calls the case, then suite, shape (as far as it matters), dtype and layout.
README_ROWS = (
    ("FRSKD loss", "loss", "", "fp32", "channels_last"),
    ("FRSKD loss", "loss", "", "bf16", "channels_last"),
    ("losses of class maps, 4x21x128x128", "logit_maps", "4x21x128x128", "fp32", "nchw"),
    ("loss", "methods", "HSAKD N=64", "fp32", "rows"),
    ("loss", "methods", "SSKD D=128 N=64", "fp32", "rows"),
    ("training step", "step", "", "fp32", "channels_last"),
)


def ours_of(rows: Sequence[Row]) -> Row | None:
    """The row of "auto"; of the forced implementation in results from before there was one."""
    names = ("auto", *FORCED["cpu"], *reversed(FORCED["cuda"]))
    found = {row["implementation"]: row for row in rows}
    return next((found[name] for name in names if name in found), None)


def readme_table(documents: Sequence[Document]) -> list[str]:
    """The six rows that the README shows, forward and backward."""
    every = [row for document in documents for row in document["rows"] if row["direction"] == "forward+backward"]
    lines = []
    for label, suite, shape, dtype, layout in README_ROWS:
        wanted = (suite, dtype, layout)
        rows = [
            row
            for row in every
            if (row["suite"], row["dtype"], row["layout"]) == wanted and row["shape"].startswith(shape)
        ]
        ours = ours_of(rows)
        if ours is None:
            raise ValueError(
                f"no result file has a row of ours for {' '.join(filter(None, (suite, shape, dtype, layout)))}; name one "
                "that has, as bench/run.py --save writes it."
            )
        baselines = {row["implementation"]: row for row in rows}
        times = [baselines[name]["ms"] if name in baselines else None for name in BASELINES]
        lines.append(
            [
                f"{label}, {ours['shape'].removeprefix(shape).strip() or ours['shape']}",
                dtype if layout == "rows" else f"{dtype} {layout}",
                *map(significant, (*times, ours["ms"])),
                ratio(ours["times_eager"]),
                ratio(ours["times_compile"]),
            ]
        )
    titles = ["case", "dtype, layout", "eager ms", "torch.compile ms", "ours ms", "vs eager", "vs compile"]
    return markdown_table(titles, lines, numbers_from=2)


def readme_block(sources: Sequence[tuple[str, Document]], link: str) -> str:
    """What stands in the README between its markers; `link` is the page with all tables, from the README's folder."""
    out = [source_line(name) for name, _ in sources]
    out += ["", *readme_table([document for _, document in sources]), ""]
    for _, document in sources:
        here = document["environment"]
        out.append(
            f"Median ms, forward and backward; {here['device_name']}, {here['threads']} threads, torch {here['torch']}, "
            f"commit {here['commit'][:12]}, {document['date']}. [All rows]({link})."
        )
        out += [f"{line[0].upper()}{line[1:]}" for line in results.verdicts(document) if line.startswith("auto")]
    return "\n".join(out)


def docs_block(sources: Sequence[tuple[str, Document]], folder: Path) -> str:
    """What stands in docs/benchmarks.md: every row of each file, the plot beside it where there is one, legends."""
    out = []
    for name, document in sources:
        out += [source_line(name), "", tables.markdown(document), ""]
        plot = Path(name).with_name(f"{Path(name).stem}-step.png")
        if (folder / plot).is_file():
            out += [f"![Where the time of a training step goes: student, self-teacher, loss]({plot.as_posix()})", ""]
        out += [f"Result file: [`{Path(name).name}`]({name}).", ""]
    return "\n".join([*out, tables.markdown_legend([document for _, document in sources])])


def methods_block(sources: Sequence[tuple[str, Document]], studies: Sequence[tuple[str, Document]]) -> str:
    """What stands in docs/methods/index.md: a row for each method."""
    from bench import methods_table

    lines = [source_line(name) for name, _ in [*sources, *studies]]
    documents = ([document for _, document in found] for found in (sources, studies))
    return "\n".join([*lines, "", *methods_table.table(*documents)])


def is_study(name: str) -> bool:
    """Whether a result file is one of scripts/evidence.py."""
    return "evidence" in Path(name).name


def source_line(name: str) -> str:
    """The line of a block that names a result file."""
    return f"<!-- bench:source {name} -->"


def relative(path: Path, folder: Path) -> str:
    """`path` as a link from a page in `folder`."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def split(page: Path, content: str) -> tuple[str, str, str]:
    """The page before its block, the block between the markers, and what follows."""
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{page} must hold {BEGIN} once and then {END} once; add both lines where the tables go.")
    start, stop = content.index(BEGIN) + len(BEGIN), content.index(END)
    return content[:start], content[start:stop], content[stop:]


Block = Callable[[list[tuple[str, Document]], list[tuple[str, Document]]], str]


def update(page: Path, files: Sequence[Path], check: bool, block: Block) -> bool:
    """Rewrite a page's block from `files`, or with `check` only compare; True when it was up to date before.

    Without `files` those are taken that the block itself names; results of scripts/evidence.py always are.
    """
    content = page.read_text(encoding="utf-8")
    before, old, after = split(page, content)
    folder = page.absolute().parent
    in_block = SOURCE.findall(old)
    names = [relative(path, folder) for path in files] or [name for name in in_block if not is_study(name)]
    if not names:
        raise ValueError(f"{page} names no result file yet; give one, as in bench/report.py bench/results/X.json.")
    sources = [(name, results.load(folder / name)) for name in names]
    studies = [(name, results.load(folder / name, evidence.SCHEMA)) for name in in_block if is_study(name)]
    new = f"{before}\n{block(sources, studies)}\n{after}"
    if new != content and not check:
        page.write_text(new, encoding="utf-8")
    return new == content


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="bench/report.py", description="Tables and plots from results of run.py.")
    result.add_argument(
        "results", nargs="*", type=Path, metavar="RESULT.json", help="files that bench/run.py --json wrote"
    )
    result.add_argument("--markdown", action="store_true", help="print every row as markdown tables")
    between = f"between {BEGIN} and {END}, from the files named here or else in that block"
    result.add_argument("--readme", type=Path, metavar="README.md", help=f"write the short table {between}")
    result.add_argument("--docs", type=Path, metavar="docs/benchmarks.md", help=f"write all tables {between}")
    result.add_argument("--methods", type=Path, metavar="docs/methods/index.md", help=f"write a row a method {between}")
    result.add_argument("--check", action="store_true", help="with a page: change nothing, 1 if it is out of date")
    result.add_argument(
        "--check-auto", action="store_true", help="1 if auto is more than 5 %% slower than eager PyTorch in any row"
    )
    result.add_argument("--plot", type=Path, metavar="PATH.png", help="write a bar plot of the one file named")
    return result


def blocks_of(arguments: argparse.Namespace) -> dict[Path, Block]:
    """The pages that the command line names, and what makes the block of each."""
    pages: dict[Path, Block] = {}
    if arguments.readme is not None:
        readme: Path = arguments.readme
        link = relative(arguments.docs or readme.parent / "docs" / "benchmarks.md", readme.absolute().parent)
        pages[readme] = lambda sources, _: readme_block(sources, link)
    if arguments.docs is not None:
        folder = arguments.docs.absolute().parent
        pages[arguments.docs] = lambda sources, _: docs_block(sources, folder)
    if arguments.methods is not None:
        pages[arguments.methods] = methods_block
    return pages


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; 1 if a page is out of date or auto loses, 2 if something is missing."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    pages = blocks_of(arguments)
    if arguments.check and not pages:
        command_line.error("--check compares a page; name it with --readme README.md or --docs docs/benchmarks.md")
    if not arguments.results and (arguments.check_auto or not pages):
        command_line.error("name a result file, as in bench/results/X.json")
    if arguments.plot is not None and len(arguments.results) != 1:
        command_line.error(f"--plot draws one result file, but {len(arguments.results)} were named")
    code = 0
    try:
        documents = [results.load(path) for path in arguments.results]
        for page, block in pages.items():
            current = update(page, arguments.results, arguments.check, block)
            if arguments.check and not current:
                print(f"{page} is out of date; run python bench/report.py without --check.")
                code = 1
            else:
                print(f"{page} {'was up to date' if current else 'was rewritten'}.")
        if arguments.plot is not None:
            plots.plots(documents[0], arguments.plot)
    except (OSError, ValueError) as problem:
        print(f"bench/report.py: {problem}", file=sys.stderr)
        return 2
    if arguments.check_auto:
        for path, document in zip(arguments.results, documents, strict=True):
            said = [line for line in results.verdicts(document) if line.startswith("auto")]
            print(*said or [f"{path} has no row of auto beside eager; run bench/run.py with --impl eager,auto."])
            code = max(code, 0 if said and not results.auto_losses(document) else 1)
    elif arguments.markdown or not (pages or arguments.plot):
        for document in documents:
            legend = tables.markdown_legend([document])
            print(f"{tables.markdown(document)}\n\n{legend}" if arguments.markdown else tables.text(document))
    return code


if __name__ == "__main__":
    sys.exit(main())
