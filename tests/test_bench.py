"""The benchmark's own rules: what it counts, what it refuses to time, and that its reports come from its files."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
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

from bench import (  # noqa: E402
    adain_rows,
    correctness,
    measure,
    memory,
    method_step,
    run,
    timing,
    traffic,
)
from bench.call import Call, map_tensors, place, tensors_in  # noqa: E402
from bench.case import DTYPES, Case, Operands, Selection  # noqa: E402
from bench.cases import (  # noqa: E402
    SUITES,
    attention,
    cases_of,
    fusion,
    in_order,
    logit_maps,
    logits,
    loss,
    methods,
    self_teacher,
    step,
)
from bench.method_step import Step  # noqa: E402

LOSS_SUITES = ("attention", "logits", "loss", "methods")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_cases(**changes: Any) -> list[Case]:
    """Every case of every suite, with a batch of two so that building its tensors is cheap."""
    selection = Selection(batch=2, input_kind="random", **changes)
    return [case for suite in in_order() for case in cases_of(suite, selection)]


def tensors(operands: Operands) -> list[Tensor]:
    return [tensor for value in operands.values() for tensor in tensors_in(value)]


def one_case(**changes: Any) -> Case:
    """The float32 loss on tiny tensors, so that a test can run it in milliseconds."""
    case = cases_of("loss", Selection(dtypes=("fp32",), layouts=("nchw",), batch=2, input_kind="random"))[0]
    return dataclasses.replace(case, operands=case.tiny, **changes)


def run_tiny(case: Case, *implementations: str, settings: measure.Settings | None = None) -> dict[str, measure.Row]:
    clock = timing.Clock("cpu")
    copy = timing.CopyMeter("cpu", clock, megabytes=1)
    settings = settings or measure.Settings(implementations=implementations, repeats=3)
    return {row.implementation: row for row in measure.run_case(case, settings, clock, copy)}


def test_case_names_are_unique_over_all_suites() -> None:
    for selection in (Selection(), Selection(quick=True)):
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_counts_are_those_of_the_tensors(suite: str, dtype: str) -> None:
    for case in cases_of(suite, Selection(dtypes=(dtype,), batch=2, input_kind="random")):
        if case.chain:
            continue
        operands = place(case.operands(), case, DTYPES[dtype], "cpu")
        moved = sum(tensor.nbytes for tensor in tensors(operands))
        if "moments" in case.operations:
            # Both maps are read for their moments, then the content for the output and the style for its gradient; the
            # output is written, its gradient read, that of the style written. All are of one size.
            assert case.bytes_moved == 2 * moved + 3 * (moved // 2), case.name
            continue
        if case.backward:
            Call(case, case.original, operands)()
            # Of the student's features, which the attention term needs once more, not all stay in the cache. Logits can be
            # done with in one pass.
            moved += sum(feature.nbytes for feature in operands.get("student_features", []))
            gradients = [tensor.grad for tensor in tensors(operands) if tensor.grad is not None]
            assert len(gradients) == sum(len(tensors_in(operands[name])) for name in case.differentiated)
            moved += sum(gradient.nbytes for gradient in gradients)
        assert case.bytes_moved == moved, case.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_byte_counts_of_fusion_are_those_of_the_maps(dtype: str) -> None:
    for case in cases_of("fusion", Selection(dtypes=(dtype,), batch=2, full=True)):
        operands = place(case.operands(), case, DTYPES[dtype], "cpu")
        call = Call(case, case.original, operands)
        output = call()
        maps = sum(tensor.nbytes for tensor in operands["inputs"])
        passes = 2 if "batch_norms" in operands else 1
        moved = passes * maps + output.nbytes
        if case.backward:
            moved += passes * (maps + output.nbytes) + sum(tensor.grad.nbytes for tensor in operands["inputs"])
        assert case.bytes_moved == moved, case.name
        assert output.dtype == DTYPES[dtype] and operands["weight"].dtype == torch.float32


def test_operands_get_the_dtype_layout_and_gradients_of_the_case() -> None:
    case = next(
        case for case in small_cases() if case.dtype == "bf16" and case.layout == "channels_last" and case.backward
    )
    operands = place(case.operands(), case, torch.bfloat16, "cpu")
    for name, value in operands.items():
        for tensor in tensors_in(value):
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert tensor.requires_grad == (name in case.differentiated)


def test_original_is_the_objective_of_the_library() -> None:
    """Eager baseline and float64 truth are one function, so it is compared with another writing of the formula."""
    for module in (attention, logits, loss):
        case = next(case for case in small_cases() if case.suite == module.__name__.rsplit(".", 1)[1])
        check_original(case)


def check_original(case: Case) -> None:
    """Raise unless the original's order of operations and the library's plain formulas give one value in float64."""
    exact = {
        name: map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)
        for name, value in case.tiny().items()
    }
    torch.testing.assert_close(case.original(**exact), case.ours("reference")(**exact), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", methods.OBJECTIVES, ids=lambda objective: objective.name)
def test_originals_of_methods_are_the_objectives_of_the_library(objective: methods.Objective) -> None:
    shape = f"{objective.name} N={objective.size.batch}"
    case = next(case for case in methods.loss_cases(Selection(dtypes=("fp32",))) if case.shape == shape)
    check_original(case)
    assert correctness.agrees_in_float64(case, case.ours("reference"), "cpu")


def test_the_original_of_class_maps_is_the_function_of_the_library() -> None:
    case = logit_maps.cases(Selection(dtypes=("fp32",), layouts=("channels_last",)))[0]
    check_original(case)
    *maps, targets = tensors(case.tiny())
    assert logit_maps.bytes_moved(*logit_maps.TINY, "fp32") == 2 * sum(one.nbytes for one in maps) + targets.nbytes
    rows = run_tiny(dataclasses.replace(case, operands=case.tiny), "eager", "auto")
    assert all(row.status == "ok" and row.ms is not None for row in rows.values()), rows


def test_the_transfer_of_adain_is_measured_by_itself() -> None:
    transfer, *_ = adain_rows.cases(Selection(dtypes=("fp32",), layouts=("channels_last",)))
    check_original(transfer)


@pytest.mark.parametrize("step", [*methods.STEPS, adain_rows.STEP], ids=lambda step: step.name)
def test_the_step_of_a_method_is_measured(step: Step) -> None:
    (case,) = method_step.cases(step, Selection(dtypes=("fp32",), layouts=("channels_last",)))
    assert correctness.agrees_in_float64(case, case.ours("reference"), "cpu")
    rows = run_tiny(dataclasses.replace(case, operands=case.tiny, images=2), "eager", "auto")
    assert list(rows) == ["eager", "auto", *step.plain, *([method_step.CACHED] if step.cached else [])]
    assert all(row.status == "ok" and row.ms is not None for row in rows.values()), rows
    assert all(row.parts_ms is None for row in rows.values())  # which are those of FRSKD's step
    if "plain with heads" in rows:  # nothing of the teacher is kept for backward
        assert rows["auto"].saved_bytes < 1.1 * rows["plain with heads"].saved_bytes


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
    for suite in ("self_teacher", "step"):
        for asked_for_by_name in (False, True):
            networks = [case for case in small_cases(named=asked_for_by_name) if case.suite == suite]
            assert [(case.dtype, case.layout, case.compiles) for case in networks] == [
                ("fp32", "nchw", False),
                ("fp32", "channels_last", asked_for_by_name),
            ]
        every = [case for case in small_cases(full=True) if case.suite == suite]
        assert len(every) == 4 and all(case.compiles for case in every)
        assert found(suite, dtypes=("bf16",), dtypes_named=True) == {("bf16", layout, True) for layout in layouts}


def test_every_file_of_cases_is_a_suite() -> None:
    files = {path.stem for path in (ROOT / "bench" / "cases").glob("*.py")} - {"__init__"}
    assert set(SUITES) == files >= {"attention", "fusion", "logits"}
    assert in_order()[-4:] == ["loss", "self_teacher", "step", "methods"]
    assert sorted([*in_order(), "data", "trainer"]) == sorted(SUITES)


def test_every_reader_is_measured() -> None:
    pytest.importorskip("lightning")
    cases = cases_of("data", Selection(quick=True))
    assert len(cases) == 9
    for case in cases:
        (row,) = measure.run_case(case, measure.Settings(repeats=2), None, None)
        assert row.runs == 2 and row.images_per_second == pytest.approx(1e3 * case.images / row.ms) and case.images >= 8


def test_the_trainers_step_takes_turns_with_the_bare_step() -> None:
    pytest.importorskip("lightning")
    case = cases_of("trainer", Selection(quick=True, batch=2))[1]
    bare, trainers, difference = measure.run_case(case, measure.Settings(repeats=3), None, None)
    assert [bare.runs, trainers.runs, difference.runs] == [3, 3, 3]
    assert bare.ms > 0 and difference.ms < trainers.ms_range[1]


def test_a_dropped_in_file_is_a_suite(tmp_path: Path) -> None:
    """Nothing but the file is needed: a copy of the tree with one more runs it by name."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    added = (ROOT / "bench" / "cases" / "attention.py").read_text("utf-8").replace('suite="attention"', 'suite="toy"')
    (tmp_path / "bench" / "cases" / "toy.py").write_text(added, "utf-8")
    command = "from bench.cases import cases_of, in_order; from bench.case import Selection; "
    command += "print(in_order()); print({case.suite for case in cases_of('toy', Selection())})"
    answer = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    order, suites = answer.stdout.splitlines()
    assert "'toy', 'loss'" in order and suites == "{'toy'}"


@pytest.mark.parametrize("node", fusion.NODES, ids=lambda node: node.name)
def test_original_node_is_that_of_the_library(node: fusion.Node) -> None:
    case = fusion.case(node, 2, "fp32", "nchw", True)
    assert correctness.agrees_in_float64(case, case.ours("reference"), "cpu")


def test_a_graph_that_breaks_is_said() -> None:
    def counting(student_logits: Tensor, **others: Any) -> Tensor:
        return student_logits.square().sum() * torch.nonzero(student_logits).numel()

    case = one_case(original=counting, differentiated=("student_logits",))
    row = measure.prepare(case, measure.Settings(implementations=("compile",))).rows["compile"]
    assert row.status == "ok" and re.fullmatch(r"\d graph breaks?", row.note)


def test_a_map_starts_backward_from_the_same_noise_in_every_dtype() -> None:
    case = fusion.case(fusion.NODES[0], 2, "bf16", "channels_last", True)
    half = Call(case, case.original, case.tiny()).upstream(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16))
    assert half.is_contiguous(memory_format=torch.channels_last) and half.std() > 0.5
    exact = Call(case, case.original, case.tiny()).upstream(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
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
    case = cases_of("self_teacher", Selection(dtypes=("fp32",), layouts=("nchw",)))[0]
    case = dataclasses.replace(case, operands=case.tiny)

    def wrong(features: Any, self_teacher: Any, targets: Tensor) -> Tensor:
        features = [feature * (1 + 1e-6) - feature.detach() * 1e-6 for feature in features]
        return case.original(features, self_teacher, targets)

    assert correctness.agrees_in_float64(case, case.original, "cpu")
    assert not correctness.agrees_in_float64(case, wrong, "cpu")
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
def small_network() -> SmallBackbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallBackbone()


def small_step(backbone: SmallBackbone, dtype: str, layout: str) -> Case:
    """A training step of a small network on two images."""
    case = step.cases(Selection(dtypes=(dtype,), layouts=(layout,), batch=2, dtypes_named=True))[0]
    operands = step.digits(2, backbone)
    return dataclasses.replace(case, operands=lambda: operands, tiny=lambda: step.tiny(backbone))


def test_steps_are_measured_side_by_side(small_network: SmallBackbone) -> None:
    settings = measure.Settings(implementations=("eager", "auto", "reference"), repeats=2, parts=True)
    settings.shipped_ms["step", "N=2"] = 5.0
    rows = run_tiny(small_step(small_network, "fp32", "channels_last"), settings=settings)
    assert list(rows) == ["eager", "auto", "reference", "plain", "auto memory=low"]
    for row in rows.values():
        assert row.status == "ok" and row.ms is not None and row.ms > 0 and row.runs == 2, row
        assert row.images_per_second == pytest.approx(2e3 / row.ms)
        assert row.times_shipped == pytest.approx(5.0 / row.ms)
        assert row.saved_bytes is not None and row.extra_bytes is not None and row.extra_bytes > 0
    eager, auto, reference, plain, low = rows.values()
    assert plain.of_plain == 1.0 and plain.times_eager is None and plain.loss_error is None
    assert auto.times_eager == pytest.approx(eager.ms / auto.ms)
    assert plain.saved_bytes <= low.saved_bytes < auto.saved_bytes <= eager.saved_bytes
    for row in (eager, auto, reference, plain):
        assert row.parts_ms is not None and sum(row.parts_ms.values()) == pytest.approx(row.ms)
        of_self_teacher = [time for part, time in row.parts_ms.items() if part.startswith("self-teacher")]
        assert all((time > 0) == (row is not plain) for time in of_self_teacher)
        assert row.parts_ms["student"] > 0 and row.parts_ms["loss"] > 0
    # As the authors ship it: eager, float32, NCHW.
    settings = measure.Settings(implementations=("eager",), repeats=1)
    shipped = run_tiny(small_step(small_network, "fp32", "nchw"), settings=settings)["eager"]
    assert settings.shipped_ms == {("step", "N=2"): shipped.ms} and shipped.times_shipped == 1.0


def test_a_wrong_step_gets_no_speed(small_network: SmallBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from frskd_fast import tasks

    class Wrong(tasks.FRSKDTask):
        def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
            parts = super().forward(images, targets)
            # the right value, and gradients 1e-6 too large
            return {"loss": parts["loss"] * (1 + 1e-6) - parts["loss"].detach() * 1e-6}

    monkeypatch.setattr(tasks, "FRSKDTask", Wrong)
    rows = run_tiny(small_step(small_network, "fp32", "nchw"), "eager", "auto")
    assert rows["eager"].ms is not None
    for name in ("auto", "auto memory=low"):
        assert rows[name].status == "WRONG" and rows[name].ms is None and rows[name].saved_bytes is None


def test_a_step_in_half_precision_runs_under_autocast(small_network: SmallBackbone) -> None:
    case = small_step(small_network, "bf16", "channels_last")
    operands = place(case.operands(), case, torch.bfloat16, "cpu")
    judge = correctness.Judge(case, operands)
    errors = judge.errors(Call(case, case.ours("reference"), operands))
    assert judge.right(errors)
    assert 1e-5 < errors.loss < 0.05, "the networks did not run in bfloat16"


def test_saved_for_backward_counts_each_storage_once() -> None:
    def function(network: nn.Module, images: Tensor) -> Tensor:
        # The linear layer keeps batch and weight, exp its result, and the product that same result twice.
        result = network(images).exp()
        return (result * result).sum()

    operands = {"network": nn.Linear(4, 3), "images": torch.ones(2, 4)}
    call = Call(one_case(differentiated=("network",)), function, operands)
    assert memory.saved_for_backward(call) == 2 * 3 * 4


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
    broken = correctness.Errors(math.nan, (math.nan,))
    floors = [1e-3]
    assert correctness.within(correctness.Errors(1e-7, (1e-4,)), broken, floors)
    assert not correctness.within(correctness.Errors(1e-4, (1e-4,)), broken, floors)
    assert not correctness.within(correctness.Errors(1e-7, (1e-2,)), broken, floors)
    assert correctness.within(correctness.Errors(1e-2, (1e-2,)), correctness.Errors(1e-2, (1e-2,)), floors)


def test_extra_memory_counts_what_one_call_allocates() -> None:
    tensor = torch.ones(1 << 20, requires_grad=True)
    case = one_case(differentiated=("tensor",))

    # two temporaries of 4 MiB alive at once, then the gradient while one of them may still live
    call = Call(case, lambda tensor: (tensor.detach() + 1).mul(2).sum() * 0 + tensor.sum(), {"tensor": tensor})
    peak = memory.extra_memory(call, "cpu")
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
    assert memory.peak_of_trace(reversed(events)) == 150


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
    samples = timing.interleave(calls, timing.Clock("cpu"), target_seconds=1.0, repeats=3)
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


def test_what_auto_picked_is_what_ran() -> None:
    """Whatever ran before: a forced run of another case must not show."""
    one_case().ours("reference")(**one_case().tiny())
    case = one_case(ours=lambda name: loss.ours("reference" if name == "auto" else name))
    assert measure.prepare(case, measure.Settings(implementations=("auto",))).rows["auto"].picked == "reference"
    rows = measure.prepare(one_case(), measure.Settings(implementations=("auto", "reference"))).rows
    import frskd_fast

    loss.ours("auto")(**one_case().tiny())
    assert rows["auto"].picked == frskd_fast.last_impl()["attention"] and rows["reference"].picked == ""


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


@pytest.mark.parametrize(
    "wrong",
    [
        ["--dtype", "fp8"],
        ["nothing"],
        ["--batch", "0"],
        ["--suite", "nothing"],
        ["--base", "HEAD", "--check-auto"],
        ["--base", "HEAD", "--impl", "eager,compile"],
    ],
)
def test_command_line_refuses_unknown_names(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        run.main(wrong)
    assert refusal.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
