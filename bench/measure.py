"""Runs one case of the benchmark: correctness first, then speed, memory and host time of every implementation."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bench import breakdown, memory
from bench.call import Call, place
from bench.case import DTYPES, Case, Program, Selection
from bench.cases import SUITES, cases_of
from bench.correctness import Judge, agrees_in_float64
from bench.names import BASELINES, DEFAULT_IMPLEMENTATIONS, is_compiled, is_ours
from bench.timing import Clock, CopyMeter, host_microseconds, interleave, quartiles, synchronise

# A baseline is timed whatever it computes; from this error on its row is marked.
BASELINE_MARK = 0.1
# of a suite whose first case stands for its operation
SMALL = Selection(dtypes=("fp32",), layouts=("nchw",), batch=2, input_kind="random", quick=True)


@dataclass
class Row:
    """One implementation of one case; figures are absent where there is nothing true to say."""

    suite: str
    case: str
    shape: str
    dtype: str
    layout: str
    direction: str
    implementation: str
    bytes_moved: int
    status: str = "ok"  # ok | WRONG (not timed) | inaccurate, NaN (baselines, timed) | unavailable | failed
    note: str = ""
    picked: str = ""  # what "auto" ran
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    ms_range: tuple[float, float] | None = None
    runs: int = 0
    times_eager: float | None = None  # eager's median / this median
    times_compile: float | None = None
    times_float32: float | None = None  # this implementation's median on the same operands in float32 / this median
    of_plain: float | None = None  # of a training step: this median / that of plain cross-entropy
    times_shipped: float | None = None  # of a network: eager's median in float32 NCHW / this median
    images_per_second: float | None = None
    gigabytes_per_second: float | None = None
    percent_of_copy: float | None = None
    copy_gigabytes_per_second: float | None = None
    extra_bytes: int | None = None
    saved_bytes: int | None = None
    host_us: float | None = None
    page_faults: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    compile_seconds: float | None = None
    parts_ms: dict[str, float] | None = None


@dataclass
class Settings:
    """How to measure, and what one case leaves for the next."""

    device: str = "cpu"
    implementations: tuple[str, ...] = DEFAULT_IMPLEMENTATIONS["cpu"]
    target_seconds: float = 1.0
    repeats: int | None = None
    host_time_of_compile: bool = True
    parts: bool = False  # of a training step: where its time goes
    # (suite, name of the original, direction) -> microseconds: a tiny call has to be compiled too, so it is measured once
    compile_host_us: dict[tuple[str, str, str], float] = field(default_factory=dict)
    # (suite, shape, dtype) -> truth: convolutions in float64 take long, and a layout changes no value
    chain_truths: dict[tuple[str, str, str], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    # (suite, shape) -> milliseconds of a network as its authors ship it
    shipped_ms: dict[tuple[str, str], float] = field(default_factory=dict)


def first_sentence(error: BaseException, length: int = 160) -> str:
    """What an exception says, on one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip()[:length]


def build(case: Case, name: str) -> Callable[..., Tensor]:
    """The function of implementation `name`; `compile` is torch.compile in its default mode for one shape."""
    if name in BASELINES:
        return case.original if name == "eager" else torch.compile(case.original, dynamic=False)
    return case.ours(name)


def rows_of(case: Case, settings: Settings) -> list[str]:
    """The names of the rows that the case has under these settings."""
    asked = settings.implementations
    more = [name for name in case.more if not is_ours(name) or name.split()[0] in asked]
    compiles = case.compiles and "compile" in asked
    return [name for name in (*asked, *more) if compiles or not is_compiled(name)]


def run_references(case: Case, device: str) -> dict[str, str]:
    """Have every operation of the case run by the reference once, so that what "auto" picks next shows; `last_impl()` then."""
    import frskd_fast

    for suite in (case.suite, *case.operations):
        for one in [case] if suite == case.suite else cases_of(suite, SMALL)[:1] if suite in SUITES else []:
            # Of two commits one may lack what the case of an operation calls; `picked` knows what was not touched.
            with contextlib.suppress(Exception):
                Call(one, one.ours("reference"), place(one.tiny(), one, torch.float32, device))()
    return frskd_fast.last_impl()


def picked(case: Case, before: dict[str, str]) -> str:
    """What "auto" ran: one name, or one for each operation; `before` is what `run_references` left."""
    import frskd_fast

    after = frskd_fast.last_impl()
    # What the reference has not touched is news only if it has changed since.
    stale = {name for name, impl in before.items() if impl != "reference" and after.get(name) == impl}
    ran = {name: after[name] for name in case.operations or (case.suite,) if name in after and name not in stale}
    return next(iter(ran.values())) if len(set(ran.values())) == 1 else ", ".join(map(" ".join, ran.items()))


@dataclass
class Prepared:
    """A case whose implementations have run once: rows for all of them, calls for those that may be timed."""

    rows: dict[str, Row] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)


def prepare(case: Case, settings: Settings) -> Prepared:
    """Check every implementation; a wrong result gets no call, and so no time."""
    # Once, before the first one compiles: what was compiled before counts to a limit.
    torch.compiler.reset()
    operands = place(case.operands(), case, DTYPES[case.dtype], settings.device)
    key = (case.suite, case.shape, case.dtype)
    judge = Judge(case, operands, settings.chain_truths.get(key))
    if case.chain:
        settings.chain_truths[key] = judge.exact
    found = Prepared()
    for name in rows_of(case, settings):
        row = found.rows[name] = Row(
            case.suite, case.name, case.shape, case.dtype, case.layout, case.direction, name, case.bytes_moved
        )
        begin, right = time.perf_counter(), True
        torch._dynamo.utils.counters.clear()
        try:
            before = run_references(case, settings.device) if name == "auto" else {}
            call = Call(case, build(case, name), operands)
            if name in BASELINES or is_ours(name):
                errors = judge.eager if name == "eager" else judge.errors(call)
                row.loss_error, row.gradient_error = errors.loss, errors.gradient
                right = judge.right(errors)
            else:
                call()
            if name == "auto":
                row.picked = picked(case, before)
            if is_compiled(name):
                synchronise(settings.device)
                row.compile_seconds = time.perf_counter() - begin
                # Where a count goes to the host, the graph ends and another one begins.
                breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
                row.note = f"{breaks} graph break{'s' * (breaks > 1)}" if breaks else ""
            if is_ours(name) and case.chain and not is_compiled(name):
                right = right and agrees_in_float64(case, call.function, settings.device)
        except Exception as error:
            row.note = first_sentence(error)
            row.status = "unavailable" if row.note.startswith("impl=") or isinstance(error, ImportError) else "failed"
            continue
        if not right and is_ours(name):
            row.status = "WRONG"
            row.note = "the result is wrong, so it is not timed"
            continue
        if name in BASELINES and not errors.finite:
            row.status = "NaN"
        elif name in BASELINES and max(errors.loss, errors.gradient or 0.0) > BASELINE_MARK:
            row.status = "inaccurate"
        call.drop_gradients()
        found.calls[name] = call
    return found


def host_time(case: Case, name: str, call: Call, settings: Settings) -> float | None:
    """Host microseconds of one implementation, by a tiny call on a CPU."""
    if settings.device == "cuda":
        return host_microseconds(call, "cuda")
    function, key = call.function, (case.suite, getattr(case.original, "__name__", ""), case.direction)
    if is_compiled(name):
        if name != "compile" or case.chain or not settings.host_time_of_compile or key in settings.compile_host_us:
            return settings.compile_host_us.get(key) if name == "compile" else None
        torch.compiler.reset()
        function = build(case, name)
    tiny = place(case.tiny(), case, DTYPES[case.dtype], settings.device)
    measured = host_microseconds(Call(case, function, tiny), settings.device)
    if is_compiled(name):
        settings.compile_host_us[key] = measured
    return measured


def in_float32(case: Case, calls: dict[str, Call], settings: Settings) -> dict[str, Call]:
    """Ours on the same operands in float32, where the case is one of half precision; a network has none.

    Memory that is fast in one minute and slow in the next would decide a ratio of two cases measured apart.
    """
    if case.dtype == "fp32" or case.chain:
        return {}
    single = replace(case, dtype="fp32")
    with contextlib.suppress(RuntimeError):  # twice the memory may be too much
        operands = place(case.operands(), single, torch.float32, settings.device)
        ours = {name: Call(single, call.function, operands) for name, call in calls.items() if is_ours(name)}
        for call in ours.values():
            call()
        return {f"{name} float32": call for name, call in ours.items()}
    return {}


def fill_in_times(row: Row, milliseconds: Sequence[float], images: int) -> None:
    """The figures of a row's runs."""
    times = sorted(milliseconds)
    row.ms, row.runs = statistics.median(times), len(times)
    row.ms_range = times[0], times[-1]
    row.ms_quartiles = quartiles(times)
    row.images_per_second = 1e3 * images / row.ms if images else None


def run_program(program: Program, settings: Settings) -> list[Row]:
    """A row for everything that the program timed."""
    rows = []
    for name, milliseconds in program.run(settings).items():
        row = Row(program.suite, program.name, program.shape, "", "", "", name, 0)
        fill_in_times(row, milliseconds, program.images)
        rows.append(row)
    return rows


def run_case(case: Case | Program, settings: Settings, clock: Clock, copy: CopyMeter) -> list[Row]:
    """Measure every implementation of `settings` on one case."""
    if isinstance(case, Program):
        return run_program(case, settings)
    prepared = prepare(case, settings)
    calls, rows = prepared.calls, prepared.rows
    copy_rate = copy.measure() if case.bytes_moved else None
    every = {**calls, **in_float32(case, calls, settings)}
    samples = interleave(every, clock, settings.target_seconds, settings.repeats) if every else {}
    for name, call in calls.items():
        row = rows[name]
        fill_in_times(row, [milliseconds for milliseconds, _ in samples[name]], case.images)
        row.page_faults = statistics.median(faults for _, faults in samples[name])
        if copy_rate is not None:
            row.gigabytes_per_second = case.bytes_moved / row.ms / 1e6
            row.copy_gigabytes_per_second = copy_rate
            row.percent_of_copy = 100.0 * row.gigabytes_per_second / copy_rate
        row.extra_bytes = memory.extra_memory(call, settings.device)
        if case.chain:
            row.saved_bytes = memory.saved_for_backward(call)
        if f"{name} float32" in samples:
            row.times_float32 = statistics.median(ms for ms, _ in samples[f"{name} float32"]) / row.ms
        whole = " " not in name and not is_compiled(name)
        if whole and settings.parts and {"images", "self_teacher"} <= set(call.operands):
            row.parts_ms = {part: share * row.ms for part, share in breakdown.shares_of(call).items()}
    fill_in_ratios(case, rows, settings)
    for name, call in calls.items():
        # last, because it compiles anew
        rows[name].host_us = None if case.images else host_time(case, name, call, settings)
    return list(rows.values())


def fill_in_ratios(case: Case, rows: dict[str, Row], settings: Settings) -> None:
    """What one timed row says of another."""
    timed: dict[str, Any] = {name: row.ms for name, row in rows.items() if row.ms is not None}
    if case.chain and (case.dtype, case.layout) == ("fp32", "nchw") and "eager" in timed:
        settings.shipped_ms[case.suite, case.shape] = timed["eager"]
    shipped = settings.shipped_ms.get((case.suite, case.shape))
    for name, ms in timed.items():
        row = rows[name]
        if name in BASELINES or is_ours(name):
            row.times_eager = timed["eager"] / ms if "eager" in timed else None
            row.times_compile = timed["compile"] / ms if "compile" in timed else None
        row.of_plain = ms / timed["plain"] if "plain" in timed else None
        row.times_shipped = shipped / ms if shipped is not None else None
