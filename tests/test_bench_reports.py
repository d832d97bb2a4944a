"""Result files of the benchmark, and the tables, pages and plots that are made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import breakdown, measure, methods_table, plots, report, results, tables  # noqa: E402


@pytest.fixture
def document() -> dict[str, Any]:
    """A result of two cases: one win, one loss, one WRONG and a NaN baseline."""

    def row(case: str, implementation: str, **figures: Any) -> dict[str, Any]:
        if "ms" in figures:
            figures["ms_quartiles"] = (0.9 * figures["ms"], 1.1 * figures["ms"])
        made = measure.Row("loss", f"loss {case}", case, "fp32", "nchw", "forward+backward", implementation, 1_000_000)
        return dataclasses.asdict(dataclasses.replace(made, **figures))

    timed = {"gigabytes_per_second": 1.0, "percent_of_copy": 12.5, "extra_bytes": 5_000_000}
    rows = [
        row("first", "eager", ms=8.0, times_eager=1.0, times_compile=0.5, **timed),
        row("first", "compile", ms=4.0, times_eager=2.0, times_compile=1.0, compile_seconds=9.0, **timed),
        row("first", "auto", ms=5.0, times_eager=1.6, times_compile=0.8, picked="cpu", **timed),
        row("first", "cpu", ms=5.0, times_eager=1.6, times_compile=0.8, **timed),
        row("second", "eager", status="NaN", ms=9.0, loss_error=math.nan, times_eager=1.0, **timed),
        row("second", "cpu", status="WRONG", loss_error=0.25, note="the result is wrong, so it is not timed"),
    ]
    environment = {
        "device": "cpu", "device_name": "A processor", "cpu": "A processor", "cores": 2, "threads": 2,
        "system": "Linux", "python": "3.11", "torch": "2.13", "triton": "3.6", "frskd_fast": "0.1.0",
        "commit": "0123456789abcdef",
    }  # fmt: skip
    return {
        "schema": results.SCHEMA,
        "date": "2026-01-02",
        "suites": ["loss"],
        "environment": environment,
        "allocator": {"mode": "warm", "settings": {"A": "1"}},
        "copy_gigabytes_per_second": 8.0,
        "rows": json.loads(json.dumps(results.jsonable(rows), allow_nan=False)),
    }


def pages(document: dict[str, Any]) -> tuple[str, str, str]:
    return tables.text(document), tables.markdown(document), report.docs_block([("x.json", document)], ROOT)


def test_tables_show_losses_and_wrong_results_plainly(document: dict[str, Any]) -> None:
    for shown in pages(document):
        assert "0.80x" in shown and "1.60x" in shown and "auto (cpu)" in shown
        assert "Forced implementations are slower than torch.compile in 1 of 1: loss first (cpu) 0.80x." in shown
        assert "Forced implementations are slower than eager PyTorch in none of 1." in shown
        assert "auto is more than 5% slower than eager PyTorch in none of 1." in shown
        assert "Wrong or failed: loss second (cpu): WRONG" in shown
        assert "NaN" in shown and "0123456789ab" in shown and "warm (A=1)" in shown
    assert [row["case"] for row in results.failures(document)] == ["loss second"]


def test_auto_may_not_lose_to_eager(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    for times_eager, code in ((0.96, 0), (0.95, 1), (None, 1)):
        document["rows"][2]["times_eager"] = times_eager
        results.save(document, path)
        assert report.main([str(path), "--check-auto"]) == code
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "auto is more than 5% slower than eager PyTorch in 1 of 1: loss first (auto) 0.95x."
    assert "no row of auto" in said[2]


def test_markdown_tables_are_rectangular(document: dict[str, Any]) -> None:
    for shown in pages(document):
        for table in shown.split("\n\n"):
            widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
            assert len(widths) <= 1


def test_columns_without_a_figure_are_left_out(document: dict[str, Any]) -> None:
    for shown in pages(document):
        assert "extra MB" in shown and "images/s" not in shown and "vs shipped" not in shown
    explained = dict(tables.meanings([document]))
    assert {"vs eager", "extra MB"} <= explained.keys() and "saved MB" not in explained
    assert all(explained["extra MB"] in pages(document)[page] for page in (0, 2))


def complete(document: dict[str, Any], implementation: str = "auto") -> dict[str, Any]:
    """The document with a row for each of the README's."""
    for _, suite, shape, dtype, layout in report.README_ROWS:
        for name, ms in (("eager", 8.0), (implementation, 4.0)):
            made = measure.Row(
                suite, f"{suite} {dtype}", f"{shape} N=2", dtype, layout, "forward+backward", name, 1, ms=ms
            )
            document["rows"].append(dataclasses.asdict(made) | {"times_eager": 8.0 / ms})
    return document


def test_pages_round_trip(document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, readme, docs = tmp_path / "bench" / "x.json", tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    results.save(complete(document), result)
    docs.parent.mkdir()
    for page in (readme, docs):
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    by_block = ["--readme", str(readme), "--docs", str(docs)]
    named = [str(result), *by_block]

    assert report.main([*named, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8"), "--check must not write"
    assert report.main(named) == 0
    written = readme.read_text(encoding="utf-8"), docs.read_text(encoding="utf-8")
    for page in written:
        assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "<!-- bench:source bench/x.json -->" in written[0] and "(docs/benchmarks.md)" in written[0]
    assert "<!-- bench:source ../bench/x.json -->" in written[1] and "(../bench/x.json)" in written[1]
    # six rows of seven columns, of forward and backward, and no more
    table = [line for line in written[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and {line.count("|") for line in table} == {8}
    assert table[-1] == "| training step, N=2 | fp32 channels_last | 8.00 | - | 4.00 | 2.00x | - |"
    # The second time nothing changes, whether the file is named or taken from the block.
    assert report.main([*named, "--check"]) == report.main([*by_block, "--check"]) == 0
    assert report.main(by_block) == 0
    assert (readme.read_text(encoding="utf-8"), docs.read_text(encoding="utf-8")) == written

    document["rows"][2]["ms"] = 5.5
    results.save(document, result)
    assert report.main([*by_block, "--check"]) == 1
    assert f"{docs} is out of date" in capsys.readouterr().out


def test_the_readme_shows_auto_and_else_what_was_forced(document: dict[str, Any]) -> None:
    forced = report.readme_table([complete(document, "cpu")])
    assert forced[-1].split(" | ")[4] == "4.00"
    with pytest.raises(ValueError, match="no result file has a row of ours for loss fp32 channels_last"):
        report.readme_table([{**document, "rows": []}])


def test_the_table_of_methods_is_made_of_both_kinds_of_results(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, result = tmp_path / "index.md", tmp_path / "x.json"
    for method in methods_table.METHODS:
        names = ("auto", "plain", *([methods_table.CACHED] if method.name == "SSKD" else []))
        for number, name in enumerate(names):
            shape = f"{method.shape} N=2"
            row = measure.Row(method.suite, shape, shape, "fp32", "channels_last", "forward+backward", name, 0)
            figures = {"ms": 20.0, "of_plain": 2.5 - number, "extra_bytes": 3_000_000 * (2 - number)}
            document["rows"].append({**dataclasses.asdict(row), **figures})
    results.save(document, result)
    accuracies = {"ce": (90.0, 92.0, 91.0), "sskd": (93.0, 94.0)}
    run = {"curve": [], "seconds": 1.0, "peak": 1, "epochs": 2}
    runs = {
        name: {str(seed): {**run, "accuracy": value} for seed, value in enumerate(values)}
        for name, values in accuracies.items()
    }
    study = {"schema": "evidence, 1", "study": "teachers", "runs": runs}
    (tmp_path / "evidence-teachers.json").write_text(json.dumps(study), encoding="utf-8")
    source = report.source_line("evidence-teachers.json")
    page.write_text(f"{report.BEGIN}\n{source}\n{report.END}\n", encoding="utf-8")

    assert report.main([str(result), "--methods", str(page)]) == 0
    assert report.main(["--methods", str(page), "--check"]) == 0, "both files are taken from the block"
    table = {line.split("]")[0][3:]: line for line in page.read_text("utf-8").splitlines() if line.startswith("| [")}
    assert list(table) == [method.name for method in methods_table.METHODS] and len(table) == 6
    assert table["SSKD"] == (
        "| [SSKD](sskd.md) | `digits_sskd_head`, from `digits_resnet20_plain` | 20.0 ms, 2.50x | 0.50x | 6.00 MB, 2.00x | "
        "72.51 → 76.20, `cifar100_resnet32x4_resnet8x4_sskd` (its README; unconfirmed by a run of ours) | +2.50 ± 6.35 |"
    )
    assert "73.80 → 77.71, `cifar100_resnet18_frskd`" in table["FRSKD"], (
        "the student alone is that of the recipe's base"
    )
    assert table["FFL"].endswith("| nothing | 20.0 ms, 2.50x | - | 6.00 MB, 2.00x | no figure found | not measured |")

    document["rows"] = [row for row in document["rows"] if not row["shape"].startswith("FFL")]
    results.save(document, result)
    assert report.main(["--methods", str(page), "--check"]) == 2
    assert "no result file has a row of auto for the step of FFL (methods, fp32" in capsys.readouterr().err


def test_every_result_file_is_named_by_a_page_or_by_the_dispatch() -> None:
    """What nothing quotes is superseded and goes."""
    readers = [ROOT / "README.md", ROOT / "frskd_fast" / "_dispatch.py", *(ROOT / "docs").rglob("*.md")]
    named = "\n".join(path.read_text(encoding="utf-8") for path in readers)
    files = sorted(path.name for path in (ROOT / "bench" / "results").iterdir())
    assert files and [name for name in files if name not in named] == []


def test_result_files_hold_no_path_of_the_machine(document: dict[str, Any], tmp_path: Path) -> None:
    document["command"] = ["bench/run.py", "--json", str(tmp_path / "mine.json"), f"--plot={ROOT}/bench/results/x.png"]
    document["rows"][-1]["note"] = (
        f"impl='cpu': {tmp_path}/lib/_C.so does not load; see https://a.b/c or C:\\temp\\_C.so"
    )
    path = tmp_path / "x.json"
    results.save(document, path)
    written = json.loads(path.read_text("utf-8"))
    assert written["command"] == ["bench/run.py", "--json", "mine.json", "--plot=bench/results/x.png"]
    assert written["rows"][-1]["note"] == "impl='cpu': _C.so does not load; see https://a.b/c or _C.so"
    for committed in sorted((ROOT / "bench" / "results").glob("*.json")):
        value = json.loads(committed.read_text("utf-8"))
        assert results.jsonable(value) == value, f"{committed.name} holds a path of the machine that made it"


def test_report_refuses_what_it_cannot_use(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, readme = tmp_path / "x.json", tmp_path / "README.md"
    result.write_text(json.dumps({**document, "schema": -1}), encoding="utf-8")
    assert report.main([str(result)]) == 2
    assert "schema -1" in capsys.readouterr().err
    result.write_text(json.dumps(complete(document)), encoding="utf-8")
    readme.write_text("no markers\n", encoding="utf-8")
    assert report.main([str(result), "--readme", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "no markers\n"


def test_plot_is_written(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "plot.png"
    plots.plot(document, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.plot({**document, "rows": []}, path)


@pytest.fixture
def steps_document(document: dict[str, Any]) -> dict[str, Any]:
    """The same with three rows of a training step: ours loses to the compiled original, and its saving form is wrong."""

    def row(implementation: str, **figures: Any) -> dict[str, Any]:
        case = "step N=32 forward+backward fp32 nchw"
        made = measure.Row("step", case, "N=32", "fp32", "nchw", "forward+backward", implementation, 0)
        return dataclasses.asdict(dataclasses.replace(made, **figures))

    parts = dict.fromkeys(breakdown.PARTS, 400.0)
    document["rows"] += [
        row("plain", ms=1000.0, of_plain=1.0, saved_bytes=90_000_000),
        row("cpu", ms=2000.0, of_plain=2.0, times_eager=1.25, times_compile=0.9, parts_ms=parts),
        row("cpu memory=low", status="WRONG", note="the result is wrong, so it is not timed"),
    ]
    return document


def test_tables_show_steps(steps_document: dict[str, Any]) -> None:
    for shown in pages(steps_document):
        assert "slower than torch.compile in 2 of 2" in shown
        assert "step N=32 forward+backward fp32 nchw (cpu) 0.90x" in shown
        assert "step N=32 forward+backward fp32 nchw (cpu memory=low): WRONG; the result is wrong" in shown
        assert "2,000" in shown and "2.00x" in shown
    assert "| N=32 forward+backward fp32 nchw | plain | 1,000 |" in tables.markdown(steps_document)
    only = [row for row in steps_document["rows"] if row["suite"] == "step"]
    assert "compile s" not in tables.text({**steps_document, "rows": only})


def test_plot_of_steps_is_written(steps_document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    both = plots.plots(steps_document, tmp_path / "plot.png")
    assert [path.name for path in both] == ["plot.png", "plot-step.png"]
    for path in both:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no step"):
        plots.plot_steps({**steps_document, "rows": []}, tmp_path / "none.png")
