"""The benchmark's own rules: what it counts, what it refuses to time, and that its reports come from its files."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import harness, report, run  # noqa: E402
from bench.cases import SUITES, attention, cases_of, logits, loss  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_cases(**changes: Any) -> list[harness.Case]:
    """Every case of every suite, with a batch of two so that building its tensors is cheap."""
    selection = harness.Selection(batch=2, input_kind="random", **changes)
    return [case for suite in SUITES for case in cases_of(suite, selection)]


def tensors(operands: harness.Operands) -> list[Tensor]:
    return [tensor for value in operands.values() for tensor in harness.tensors_in(value)]


def one_case(**changes: Any) -> harness.Case:
    """The float32 loss on tiny tensors, so that a test can run it in milliseconds."""
    case = cases_of("loss", harness.Selection(dtypes=("fp32",), layouts=("nchw",), batch=2, input_kind="random"))[0]
    return dataclasses.replace(case, operands=case.tiny, **changes)


def run_tiny(case: harness.Case, *implementations: str) -> dict[str, harness.Row]:
    clock = harness.Clock("cpu")
    copy = harness.CopyMeter("cpu", clock, megabytes=1)
    settings = harness.Settings(implementations=implementations, repeats=3)
    return {row.implementation: row for row in harness.run_case(case, settings, clock, copy)}


def test_case_names_are_unique_over_all_suites() -> None:
    for selection in (harness.Selection(), harness.Selection(quick=True)):
        names = [case.name for suite in SUITES for case in cases_of(suite, selection)]
        assert len(names) == len(set(names)) > 0


def test_full_run_covers_the_documented_shapes_dtypes_and_layouts() -> None:
    found = {(case.suite, case.shape, case.dtype, case.layout, case.backward) for case in small_cases()}
    for dtype in ("fp32", "bf16", "fp16"):
        for layout in ("nchw", "channels_last"):
            assert ("loss", "N=2 K=100", dtype, layout, True) in found
            assert ("logits", "2x21x128x128", dtype, layout, True) in found
            assert ("attention", "N=2", dtype, layout, True) in found
            assert (("attention", "N=2", dtype, layout, False) in found) == (dtype == "fp32")
        for classes in (100, 1000, 32000):
            assert ("logits", f"2x{classes}", dtype, "rows", True) in found


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_byte_counts_are_those_of_the_tensors(suite: str, dtype: str) -> None:
    for case in cases_of(suite, harness.Selection(dtypes=(dtype,), batch=2, input_kind="random")):
        operands = harness.place(case.operands(), case, harness.DTYPES[dtype], "cpu")
        moved = sum(tensor.nbytes for tensor in tensors(operands))
        if case.backward:
            harness.Call(case, case.original, operands)()
            # The attention term needs nothing of the teacher in backward; the logit terms read all again.
            again = [value for name, value in operands.items() if name != "teacher_features"]
            moved += sum(tensor.nbytes for value in again for tensor in harness.tensors_in(value))
            gradients = [tensor.grad for tensor in tensors(operands) if tensor.grad is not None]
            assert len(gradients) == sum(len(harness.tensors_in(operands[name])) for name in case.differentiated)
            moved += sum(gradient.nbytes for gradient in gradients)
        assert case.bytes_moved == moved, case.name


def test_operands_get_the_dtype_layout_and_gradients_of_the_case() -> None:
    case = next(
        case for case in small_cases() if case.dtype == "bf16" and case.layout == "channels_last" and case.backward
    )
    operands = harness.place(case.operands(), case, torch.bfloat16, "cpu")
    for name, value in operands.items():
        for tensor in harness.tensors_in(value):
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert tensor.requires_grad == (name in case.differentiated)


def test_original_is_the_objective_of_the_library() -> None:
    """Eager baseline and float64 truth are one function, so it is compared with another writing of the formula."""
    for module in (attention, logits, loss):
        case = next(case for case in small_cases() if case.suite == module.__name__.rsplit(".", 1)[1])
        exact = {
            name: harness.map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)
            for name, value in case.tiny().items()
        }
        torch.testing.assert_close(case.original(**exact), case.ours("reference")(**exact), rtol=1e-12, atol=1e-14)


def test_a_right_implementation_is_timed() -> None:
    rows = run_tiny(one_case(), "eager", "reference")
    for row in rows.values():
        assert row.status == "ok" and row.ms is not None and row.ms > 0 and row.runs == 3
        assert row.host_us is not None and row.host_us > 0
        assert row.loss_error is not None and row.loss_error < 1e-5
    eager, reference = rows["eager"], rows["reference"]
    assert eager.ms is not None and reference.ms is not None
    assert eager.times_eager == 1.0 and reference.times_eager == pytest.approx(eager.ms / reference.ms)


def wrong_in_the_value(*_: object, **operands: Any) -> Tensor:
    return loss.original(**operands) * (1 + 1e-3)


def wrong_in_a_gradient(**operands: Any) -> Tensor:
    features = list(operands["student_features"])
    # the right value, and a gradient of one level that is 1 per cent too large
    features[0] = features[0] * 1.01 - features[0].detach() * 0.01
    return loss.original(**{**operands, "student_features": features})


def not_finite(**operands: Any) -> Tensor:
    return loss.original(**operands) * math.nan


@pytest.mark.parametrize("wrong", [wrong_in_the_value, wrong_in_a_gradient, not_finite])
def test_a_wrong_implementation_gets_no_speed(wrong: Any) -> None:
    rows = run_tiny(one_case(ours=lambda implementation: wrong), "eager", "cpu")
    assert rows["eager"].ms is not None
    row = rows["cpu"]
    assert row.status == "WRONG"
    assert row.ms is None and row.times_eager is None and row.gigabytes_per_second is None
    worst = max(row.loss_error or 0.0, row.gradient_error or 0.0)
    assert math.isnan(row.loss_error or 0.0) or worst > 1e-4


def test_a_missing_gradient_is_a_failure() -> None:
    def detached(**operands: Any) -> Tensor:
        return loss.original(**{**operands, "student_features": [f.detach() for f in operands["student_features"]]})

    row = run_tiny(one_case(ours=lambda implementation: detached), "eager", "cpu")["cpu"]
    assert row.status == "failed" and row.ms is None and "no gradient" in row.note


def test_a_baseline_that_is_nan_keeps_its_time_and_is_marked() -> None:
    calls = []

    def overflowing(**operands: Any) -> Tensor:
        calls.append(operands)
        value = loss.original(**operands)
        return value * (math.nan if value.dtype == torch.float32 else 1.0)

    rows = run_tiny(one_case(original=overflowing), "eager", "reference")
    assert calls
    assert rows["eager"].status == "NaN" and rows["eager"].ms is not None
    # Where eager is NaN only the floor is allowed, which the float32 reference keeps.
    assert rows["reference"].status == "ok"


def test_nan_of_eager_does_not_excuse_an_error() -> None:
    broken = harness.Errors(math.nan, (math.nan,))
    floors = [1e-3]
    assert harness.within(harness.Errors(1e-7, (1e-4,)), broken, floors)
    assert not harness.within(harness.Errors(1e-4, (1e-4,)), broken, floors)
    assert not harness.within(harness.Errors(1e-7, (1e-2,)), broken, floors)
    assert harness.within(harness.Errors(1e-2, (1e-2,)), harness.Errors(1e-2, (1e-2,)), floors)


def test_extra_memory_counts_what_one_call_allocates() -> None:
    tensor = torch.ones(1 << 20, requires_grad=True)
    case = one_case(differentiated=("tensor",))

    # two temporaries of 4 MiB alive at once, then the gradient while one of them may still live
    call = harness.Call(case, lambda tensor: (tensor.detach() + 1).mul(2).sum() * 0 + tensor.sum(), {"tensor": tensor})
    peak = harness.extra_memory(call, "cpu")
    assert 2 * tensor.nbytes <= peak < 2 * tensor.nbytes + 4096
    assert tensor.grad is None


def test_peak_is_the_highest_running_sum() -> None:
    sizes = [100, 50, -100, 30, -80]
    events = [
        {"name": "[memory]", "ts": position, "args": {"Device Type": 0, "Bytes": size}}
        for position, size in enumerate(sizes)
    ]
    events.append({"name": "[memory]", "ts": 0.5, "args": {"Device Type": 1, "Bytes": 10_000}})
    events.append({"name": "aten::add", "ts": 0.5})
    assert harness.peak_of_trace(reversed(events)) == 150


def test_every_round_runs_every_implementation_in_turn() -> None:
    order: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def drop_gradients(self) -> None:
            pass

        def __call__(self) -> None:
            order.append(self.name)

    calls: Any = {name: Recorded(name) for name in "abc"}
    samples = harness.interleave(calls, harness.Clock("cpu"), target_seconds=1.0, repeats=3)
    warm_up, timed = order[:6], order[6:]
    assert warm_up == ["a", "b", "c"] * 2
    assert "".join(timed) == "abc" + "bca" + "cab"
    assert all(len(runs) == 3 for runs in samples.values())


def test_drawn_digits_and_features_have_the_pyramid_of_the_network() -> None:
    from bench import inputs

    drawn = inputs.drawn_digits(4)
    assert drawn.shape == (4, 8, 8) and 0.0 <= drawn.min() < 0.1 < 0.9 < drawn.max() <= 1.0
    given, random = inputs.network_inputs(2), inputs.random_inputs(2)
    for features, other in (
        (given.student_features, random.student_features),
        (given.teacher_features, random.teacher_features),
    ):
        assert [feature.shape for feature in features] == [feature.shape for feature in other]
        assert all(bool((feature >= 0).all()) and bool((feature > 0).any()) for feature in features)
    assert given.student_logits.shape == random.student_logits.shape == (2, inputs.CLASSES)


@pytest.fixture
def document() -> dict[str, Any]:
    """A result of two cases: one win, one loss, one WRONG and a NaN baseline."""

    def row(case: str, implementation: str, **figures: Any) -> dict[str, Any]:
        if "ms" in figures:
            figures["ms_quartiles"] = (0.9 * figures["ms"], 1.1 * figures["ms"])
        made = harness.Row("loss", f"loss {case}", case, "fp32", "nchw", "forward+backward", implementation, 1_000_000)
        return dataclasses.asdict(dataclasses.replace(made, **figures))

    timed = {"gigabytes_per_second": 1.0, "percent_of_copy": 12.5, "extra_bytes": 5_000_000}
    rows = [
        row("first", "eager", ms=8.0, times_eager=1.0, times_compile=0.5, **timed),
        row("first", "compile", ms=4.0, times_eager=2.0, times_compile=1.0, compile_seconds=9.0, **timed),
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
        "schema": report.SCHEMA,
        "date": "2026-01-02",
        "suites": ["loss"],
        "environment": environment,
        "allocator": {"mode": "warm", "settings": {"A": "1"}},
        "copy_gigabytes_per_second": 8.0,
        "rows": json.loads(json.dumps(report.jsonable(rows), allow_nan=False)),
    }


def test_tables_show_losses_and_wrong_results_plainly(document: dict[str, Any]) -> None:
    for shown in (report.text(document), report.markdown(document), report.block([("x.json", document)])):
        assert "0.80x" in shown and "1.60x" in shown
        assert "Slower than torch.compile in 1 of 1: loss first (cpu) 0.80x." in shown
        assert "Slower than eager PyTorch in none of 1." in shown
        assert "Wrong or failed: loss second (cpu): WRONG" in shown
        assert "NaN" in shown and "0123456789ab" in shown and "warm (A=1)" in shown
    assert [row["case"] for row in report.failures(document)] == ["loss second"]


def test_markdown_tables_are_rectangular(document: dict[str, Any]) -> None:
    for shown in (report.markdown(document), report.block([("x.json", document)])):
        for table in shown.split("\n\n"):
            widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
            assert len(widths) <= 1


def test_readme_round_trip(document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, readme = tmp_path / "bench" / "results" / "x.json", tmp_path / "README.md"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps(document), encoding="utf-8")
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    named, by_block = [str(result), "--readme", str(readme)], ["--readme", str(readme)]

    assert report.main([*named, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8"), "--check must not write"
    assert report.main(named) == 0
    written = readme.read_text(encoding="utf-8")
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert "<!-- bench:source bench/results/x.json -->" in written
    # The second time nothing changes, whether the file is named or taken from the block.
    assert report.main([*named, "--check"]) == report.main([*by_block, "--check"]) == 0
    assert report.main(by_block) == 0 and readme.read_text(encoding="utf-8") == written

    document["rows"][2]["ms"] = 5.5
    result.write_text(json.dumps(document), encoding="utf-8")
    assert report.main([*by_block, "--check"]) == 1
    assert "out of date" in capsys.readouterr().out


def test_report_refuses_what_it_cannot_use(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, readme = tmp_path / "x.json", tmp_path / "README.md"
    result.write_text(json.dumps({**document, "schema": -1}), encoding="utf-8")
    assert report.main([str(result)]) == 2
    assert "schema -1" in capsys.readouterr().err
    result.write_text(json.dumps(document), encoding="utf-8")
    readme.write_text("no markers\n", encoding="utf-8")
    assert report.main([str(result), "--readme", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "no markers\n"


def test_plot_is_written(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "plot.png"
    report.plot(document, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot({**document, "rows": []}, path)


@pytest.mark.parametrize("script", ["run.py", "report.py"])
def test_help_runs_from_another_folder(script: str, tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert f"bench/{script}" in answer.stdout


@pytest.mark.parametrize("wrong", [["--dtype", "fp8"], ["nothing"], ["--batch", "0"], ["--suite", "nothing"]])
def test_command_line_refuses_unknown_names(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        run.main(wrong)
    assert refusal.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
