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
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import harness, report, run, traffic  # noqa: E402
from bench.cases import SUITES, attention, cases_of, fusion, logits, loss, self_teacher, step  # noqa: E402

LOSS_SUITES = ("attention", "logits", "loss")


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


@pytest.mark.parametrize("suite", LOSS_SUITES)
@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_byte_counts_are_those_of_the_tensors(suite: str, dtype: str) -> None:
    for case in cases_of(suite, harness.Selection(dtypes=(dtype,), batch=2, input_kind="random")):
        operands = harness.place(case.operands(), case, harness.DTYPES[dtype], "cpu")
        moved = sum(tensor.nbytes for tensor in tensors(operands))
        if case.backward:
            harness.Call(case, case.original, operands)()
            # Of the student's features, which the attention term needs once more, not all stay in the cache. Logits can be
            # done with in one pass.
            moved += sum(feature.nbytes for feature in operands.get("student_features", []))
            gradients = [tensor.grad for tensor in tensors(operands) if tensor.grad is not None]
            assert len(gradients) == sum(len(harness.tensors_in(operands[name])) for name in case.differentiated)
            moved += sum(gradient.nbytes for gradient in gradients)
        assert case.bytes_moved == moved, case.name


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_byte_counts_of_fusion_are_those_of_the_maps(dtype: str) -> None:
    for case in cases_of("fusion", harness.Selection(dtypes=(dtype,), batch=2, full=True)):
        operands = harness.place(case.operands(), case, harness.DTYPES[dtype], "cpu")
        call = harness.Call(case, case.original, operands)
        output = call()
        maps = sum(tensor.nbytes for tensor in operands["inputs"])
        passes = 2 if "batch_norms" in operands else 1
        moved = passes * maps + output.nbytes
        if case.backward:
            moved += passes * (maps + output.nbytes) + sum(tensor.grad.nbytes for tensor in operands["inputs"])
        assert case.bytes_moved == moved, case.name
        assert output.dtype == harness.DTYPES[dtype] and operands["weight"].dtype == torch.float32


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


def test_full_run_covers_the_settings_of_the_networks() -> None:
    def found(suite: str, **changes: Any) -> set[tuple[str, str, bool]]:
        return {(case.dtype, case.layout, case.backward) for case in small_cases(**changes) if case.suite == suite}

    layouts = ("nchw", "channels_last")
    assert found("self_teacher") == {("fp32", layout, True) for layout in layouts}
    assert found("self_teacher", full=True) == {
        (dtype, layout, True) for dtype in ("fp32", "bf16") for layout in layouts
    }
    assert {("fp16", layout, True) for layout in layouts} <= found("fusion")
    nodes = [case for case in small_cases(full=True, dtypes=("bf16",)) if case.suite == "fusion"]
    assert len(nodes) == len(fusion.NODES) * 2 * 2

    # A network takes a minute or more to compile, so it is compiled where it was asked for by name.
    implementations = ("eager", "compile", "cpu")
    for named_on_the_command_line in (False, True):
        selected = {"named": named_on_the_command_line}
        networks = small_cases(dtypes=("fp32",), **selected)
        compiles = [case.compiles for case in networks if case.suite == "self_teacher"]
        assert compiles == [False, named_on_the_command_line]
        few = step.settings(harness.Selection(dtypes=("fp32", "bf16"), **selected), implementations, dtypes_named=False)
        assert [(setting.dtype, setting.layout) for setting in few] == [("fp32", layout) for layout in layouts]
        compiles = [any(variant.compiled for variant in setting.variants) for setting in few]
        assert compiles == [False, named_on_the_command_line]
    named = step.settings(harness.Selection(dtypes=("bf16",)), ("eager", "cpu"), dtypes_named=True)
    assert {setting.dtype for setting in named} == {"bf16"}
    every = step.settings(harness.Selection(full=True), implementations, dtypes_named=False)
    assert len(every) == 4 and all(setting.variants == step.VARIANTS for setting in every)


@pytest.mark.parametrize("node", fusion.NODES, ids=lambda node: node.name)
def test_original_node_is_that_of_the_library(node: fusion.Node) -> None:
    case = fusion.case(node, 2, "fp32", "nchw", True)
    assert harness.agrees_in_float64(case, case.ours("reference"), "cpu")


def test_a_map_starts_backward_from_the_same_noise_in_every_dtype() -> None:
    case = fusion.case(fusion.NODES[0], 2, "bf16", "channels_last", True)
    half = harness.Call(case, case.original, case.tiny()).upstream(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16))
    assert half.is_contiguous(memory_format=torch.channels_last) and half.std() > 0.5
    exact = harness.Call(case, case.original, case.tiny()).upstream(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    assert torch.equal(half.double(), exact)


def test_the_original_self_teacher_computes_what_the_module_does() -> None:
    given = self_teacher.tiny()
    network, features = given["self_teacher"].double(), [feature.double() for feature in given["features"]]
    (theirs, their_logits), (ours, our_logits) = (
        function(network, features) for function in (self_teacher.original, self_teacher.fast)
    )
    torch.testing.assert_close([*theirs, their_logits], [*ours, our_logits], rtol=1e-10, atol=1e-12)


def test_the_original_self_teacher_issues_the_operations_of_the_original() -> None:
    """Counted in the method's published code: 51 ReLU, 14 products, 14 sums, 25 BatchNorms."""
    given = self_teacher.tiny()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        self_teacher.original(given["self_teacher"], given["features"])
    counts = {event.key: event.count for event in profile.key_averages()}
    # A BatchNorm in training mode counts its batches by one more addition.
    names = ("aten::relu", "aten::mul", "aten::batch_norm")
    assert [counts[name] for name in names] == [51, 14, 25]
    assert counts["aten::add"] + counts["aten::add_"] == 14 + 25


def test_multiply_adds_are_those_of_the_convolutions() -> None:
    given = self_teacher.tiny()
    found: list[int] = []

    def count(module: nn.Conv2d, inputs: Any, output: Tensor) -> None:
        found.append(output.numel() * module.weight[0].numel())

    for module in given["self_teacher"].modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    self_teacher.original(given["self_teacher"], given["features"])
    assert traffic.total(traffic.original(2, self_teacher.TINY_PYRAMID)).multiply_adds == sum(found)
    ours = traffic.total(traffic.ours(2, self_teacher.TINY_PYRAMID)).multiply_adds
    # Before up-sampling there is a quarter of the pixels.
    saved = sum(
        3 * 2 * side * side // 4 * 2 * channels * 4 * channels for channels, side in self_teacher.TINY_PYRAMID[:-1]
    )
    assert ours == sum(found) - saved


def test_documented_traffic_is_the_counted_one() -> None:
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n".join(traffic.table(32)) in document


def test_a_chain_is_judged_in_float64_too() -> None:
    """A gradient that is wrong by less than the luck of roundings allows."""
    case = cases_of("self_teacher", harness.Selection(dtypes=("fp32",), layouts=("nchw",)))[0]
    case = dataclasses.replace(case, operands=case.tiny)

    def wrong(features: Any, self_teacher: Any, targets: Tensor) -> Tensor:
        features = [feature * (1 + 1e-6) - feature.detach() * 1e-6 for feature in features]
        return case.original(features, self_teacher, targets)

    assert harness.agrees_in_float64(case, case.original, "cpu")
    assert not harness.agrees_in_float64(case, wrong, "cpu")
    rows = run_tiny(dataclasses.replace(case, ours=lambda name: wrong), "eager", "cpu")
    assert rows["eager"].ms is not None and rows["cpu"].status == "WRONG" and rows["cpu"].ms is None
    rows = run_tiny(dataclasses.replace(case, ours=lambda name: case.original), "eager", "cpu")
    assert rows["cpu"].status == "ok"


class SmallBackbone(nn.Module):
    """Four maps of 4 to 32 channels, each of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [4, 8, 16, 32]
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip([3, 4, 8, 16], self.channels, strict=True)
        )
        self.fc = nn.Linear(32, 100)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = []
        for convolution in self.convolutions:
            images = convolution(images)
            features.append(images)
        return features, self.fc(images.mean((2, 3)))


@pytest.fixture(scope="module")
def small_problem() -> step.Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return step.problem(2, SmallBackbone())


def run_steps(given: step.Problem, layout: str) -> dict[str, step.StepRow]:
    eager = tuple(variant for variant in step.VARIANTS if not variant.compiled)
    measurement = step.Measurement("cpu", harness.Clock("cpu"), impl="reference", repeats=2, plot=True, shipped_ms=5.0)
    rows = step.run_setting(step.Setting("fp32", layout, eager), given, measurement)
    return {row.implementation: row for row in rows}


def test_steps_are_measured_side_by_side(small_problem: step.Problem) -> None:
    rows = run_steps(small_problem, "channels_last")
    assert list(rows) == ["plain", "original", "ours", "ours memory=low"]
    for row in rows.values():
        assert row.status == "ok" and row.ms is not None and row.ms > 0 and row.runs == 2, row
        assert row.images_per_second == pytest.approx(2e3 / row.ms)
        assert row.times_shipped == pytest.approx(5.0 / row.ms)
        assert row.saved_bytes is not None and row.peak_bytes is not None and row.peak_bytes > 0
    plain, original, ours, low = rows.values()
    assert plain.times_plain == 1.0 and plain.times_eager is None and plain.loss_error is None
    assert ours.times_eager == pytest.approx(original.ms / ours.ms)
    assert plain.saved_bytes <= low.saved_bytes < ours.saved_bytes <= original.saved_bytes
    for row in (plain, original, ours):
        assert row.parts_ms is not None and sum(row.parts_ms.values()) == pytest.approx(row.ms)
        of_self_teacher = [time for part, time in row.parts_ms.items() if part.startswith("self-teacher")]
        assert all((time > 0) == (row is not plain) for time in of_self_teacher)
        assert row.parts_ms["student"] > 0 and row.parts_ms["loss"] > 0


def test_a_wrong_step_gets_no_speed(small_problem: step.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    from frskd_fast import tasks

    class Wrong(tasks.FRSKDTask):
        def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
            parts = super().forward(images, targets)
            # the right value, and gradients 1e-6 too large
            return {"loss": parts["loss"] * (1 + 1e-6) - parts["loss"].detach() * 1e-6}

    monkeypatch.setattr(tasks, "FRSKDTask", Wrong)
    rows = run_steps(small_problem, "nchw")
    assert rows["original"].ms is not None
    for name in ("ours", "ours memory=low"):
        assert rows[name].status == "WRONG" and rows[name].ms is None and rows[name].saved_bytes is None


def test_a_step_in_half_precision_runs_under_autocast(small_problem: step.Problem) -> None:
    exact = step.truth(small_problem, "cpu")
    setting = step.Setting("bf16", "channels_last", ())
    eager, ours = (
        step.errors(step.Step(variant, setting, small_problem, "cpu", "reference"), exact)
        for variant in step.VARIANTS[1:3]
    )
    assert step.right(ours, eager, "bf16")
    assert 1e-5 < ours.loss < 0.05, "the networks did not run in bfloat16"


def test_saved_for_backward_counts_each_storage_once() -> None:
    class Stub:
        backbone, self_teacher = nn.Linear(4, 3), nn.Identity()
        images, targets = torch.ones(2, 4), torch.zeros(2)

        def drop_gradients(self) -> None:
            pass

        def forward(self) -> Tensor:
            # The linear layer keeps batch and weight, exp its result, and the product that same result twice.
            result = self.backbone(self.images).exp()
            return (result * result).sum()

    stub: Any = Stub()
    assert step.saved_for_backward(stub) == 2 * 3 * 4


def test_a_right_implementation_is_timed() -> None:
    rows = run_tiny(one_case(), "eager", "reference")
    for row in rows.values():
        assert row.status == "ok" and row.ms is not None and row.ms > 0 and row.runs == 3
        assert row.host_us is not None and row.host_us > 0
        assert row.loss_error is not None and row.loss_error < 1e-5
    eager, reference = rows["eager"], rows["reference"]
    assert eager.ms is not None and reference.ms is not None
    assert eager.times_eager == 1.0 and reference.times_eager == pytest.approx(eager.ms / reference.ms)


def test_half_precision_is_timed_beside_float32() -> None:
    """A ratio of two cases would be one of two minutes, in which memory may not have been as fast."""
    kinds: list[torch.dtype] = []

    def recorded(**operands: Any) -> Tensor:
        kinds.append(operands["student_features"][0].dtype)
        return loss.original(**operands)

    half = dataclasses.replace(one_case(), dtype="bf16", original=loss.original, ours=lambda _: recorded)
    rows = run_tiny(half, "eager", "reference")
    assert rows["reference"].times_float32 is not None and rows["eager"].times_float32 is None
    timed = [kind for kind in kinds if kind != torch.float64]
    assert timed.count(torch.float32) >= rows["reference"].runs == 3
    assert run_tiny(one_case(), "eager", "reference")["reference"].times_float32 is None


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


def test_a_case_that_must_not_compile_has_no_such_row() -> None:
    rows = run_tiny(one_case(compiles=False), "eager", "compile", "reference")
    assert list(rows) == ["eager", "reference"]


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


@pytest.fixture
def steps_document(document: dict[str, Any]) -> dict[str, Any]:
    """The same with three rows of a training step: ours loses to the compiled original, and its saving form is wrong."""

    def row(implementation: str, **figures: Any) -> dict[str, Any]:
        made = step.StepRow("step N=32 fp32 nchw", "fp32", "nchw", implementation, 32)
        return dataclasses.asdict(dataclasses.replace(made, **figures))

    parts = dict.fromkeys(step.PARTS, 400.0)
    document["steps"] = [
        row("plain", ms=1000.0, times_plain=1.0, saved_bytes=90_000_000),
        row("ours", ms=2000.0, times_plain=2.0, times_eager=1.25, times_compile=0.9, parts_ms=parts),
        row("ours memory=low", status="WRONG", note="the result is wrong, so it is not timed"),
    ]
    return document


def test_tables_show_steps(steps_document: dict[str, Any]) -> None:
    block = report.block([("x.json", steps_document)])
    for shown in (report.text(steps_document), report.markdown(steps_document), block):
        assert "Slower than torch.compile in 2 of 2" in shown and "step N=32 fp32 nchw (ours) 0.90x" in shown
        assert "step N=32 fp32 nchw (ours memory=low): WRONG; the result is wrong" in shown
        assert "2,000" in shown and "2.00x" in shown and report.STEP_LEGEND in shown
    assert "| N=32 fp32 nchw | plain | 1,000 |" in block and "compile s" not in block
    for table in block.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1
    only = {**steps_document, "rows": [], "suites": ["step"]}
    assert report.LEGEND not in report.text(only) and "plain" in report.markdown(only)


def test_plot_of_steps_is_written(steps_document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    both = report.plots(steps_document, tmp_path / "plot.png")
    assert [path.name for path in both] == ["plot.png", "plot-step.png"]
    assert report.plots({**steps_document, "rows": []}, tmp_path / "only.png") == [tmp_path / "only.png"]
    for path in (*both, tmp_path / "only.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no step"):
        report.plot_steps({**steps_document, "steps": []}, tmp_path / "none.png")


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
