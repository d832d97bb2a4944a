"""Runs one case of the benchmark: correctness first, then speed, memory and host time of every implementation."""

from __future__ import annotations

import copy as copying
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LAYOUTS = ("nchw", "channels_last")
BASELINES = ("eager", "compile")
OURS = ("reference", "cpu", "triton", "cuda")
IMPLEMENTATIONS = (*BASELINES, *OURS)
DEFAULT_IMPLEMENTATIONS = {"cpu": (*BASELINES, "cpu"), "cuda": (*BASELINES, "triton", "cuda")}

# Upstream gradient of the loss. float16 is trained with a scaled loss (GradScaler): this lifts the gradients above its
# subnormal numbers and keeps FRSKD's beta = 100 times it below its largest number.
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 256.0}

# What an implementation may err beyond eager PyTorch, relative to the largest true value: the loss is accumulated in
# float32; a gradient is accumulated in float32 and rounded once to its dtype.
LOSS_FLOOR = 16 * torch.finfo(torch.float32).eps
# Through many layers two right results differ by luck: a rounding moves a value across the kink of a ReLU, and its whole
# term leaves the gradient. So a chain's gradients are compared as one vector, and this many times eager's error passes.
# What that would let through shows in float64, where both must agree to EXACT.
CHAIN_SLACK = 4.0
EXACT = 1e-8
# A baseline is timed whatever it computes; from this error on its row is marked.
BASELINE_MARK = 0.1

MINIMUM_RUNS, MAXIMUM_RUNS = 5, 200
MINIMUM_SLOW_RUNS = 3  # of each implementation, where one round of all takes more than a second

UPSTREAM_SEED = 11  # of the random gradient that a case with a map for its result starts from

Operands = dict[str, Any]  # argument name -> Tensor, sequence of Tensor, or Module


@dataclass(frozen=True)
class Selection:
    """What the command line leaves of every suite."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    layouts: tuple[str, ...] = LAYOUTS
    batch: int | None = None
    input_kind: str = "features"
    quick: bool = False
    named: bool = False  # the command line names suites: what takes minutes to compile is then wanted
    full: bool = False  # also the settings that take minutes


@dataclass(frozen=True)
class Case:
    """One row group of the table: an operation on one shape, dtype, layout and direction.

    `original` is the formula in the order of operations of the methods' published code; it is the eager baseline, what
    torch.compile gets, and, in float64, the truth. `ours(name)` gives a function with the same arguments. Both return
    the loss, a scalar, or a tensor that gets a fixed random upstream gradient.
    """

    suite: str
    shape: str
    dtype: str
    layout: str
    backward: bool
    bytes_moved: int  # what must be read and written at least, each pass once
    operands: Callable[[], Operands]  # float32, NCHW, on the CPU
    tiny: Callable[[], Operands]
    differentiated: tuple[str, ...]
    original: Callable[..., Tensor]
    ours: Callable[[str], Callable[..., Tensor]]
    weight: float = 1.0  # of this term in a training objective; multiplies the loss scale of float16
    # operands that are parameters: as under autocast, float32 beside half-precision maps (modules always are)
    parameters: tuple[str, ...] = ()
    # a network of many layers: judged by CHAIN_SLACK, see there
    chain: bool = False
    # Where compiling takes minutes: whether this case does it, and whether a tiny call is compiled for its host time.
    compiles: bool = True
    host_time_of_compile: bool = True

    @property
    def upstream(self) -> float:
        """The gradient of the scaled objective for the loss that the case computes."""
        return LOSS_SCALE[self.dtype] * (self.weight if self.dtype == "fp16" else 1.0)

    @property
    def direction(self) -> str:
        """How the rows call it."""
        return "forward+backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """Unique over all suites."""
        return f"{self.suite} {self.shape} {self.direction} {self.dtype} {self.layout}"


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
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    ms_range: tuple[float, float] | None = None
    runs: int = 0
    times_eager: float | None = None  # eager's median / this median
    times_compile: float | None = None
    times_float32: float | None = None  # this implementation's median on the same operands in float32 / this median
    gigabytes_per_second: float | None = None
    percent_of_copy: float | None = None
    copy_gigabytes_per_second: float | None = None
    extra_bytes: int | None = None
    host_us: float | None = None
    page_faults: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    compile_seconds: float | None = None


@dataclass
class Settings:
    """How to measure."""

    device: str = "cpu"
    implementations: tuple[str, ...] = DEFAULT_IMPLEMENTATIONS["cpu"]
    target_seconds: float = 1.0
    repeats: int | None = None
    host_time_of_compile: bool = True
    # (suite, direction) -> microseconds: a tiny call has to be compiled too, so it is measured once
    compile_host_us: dict[tuple[str, str], float] = field(default_factory=dict)
    # (suite, shape, dtype) -> truth: convolutions in float64 take long, and a layout changes no value
    chain_truths: dict[tuple[str, str, str], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` applied to a tensor or to each one of a sequence."""
    if isinstance(value, Tensor):
        return function(value)
    return [function(tensor) for tensor in value]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an operand; the parameters of a module."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, Tensor) else list(value)


def memory_format_of(layout: str, tensor: Tensor) -> torch.memory_format:
    """channels_last for maps where the layout says so."""
    return torch.channels_last if layout == "channels_last" and tensor.dim() == 4 else torch.contiguous_format


def place(operands: Operands, case: Case, dtype: torch.dtype, device: str) -> Operands:
    """Operands as fresh tensors in `dtype`, the case's layout and on `device`; the differentiated ones require grad.

    Parameters and modules are given at least float32.
    """
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.detach().to(device).clone(memory_format=memory_format_of(case.layout, tensor))

    placed = {}
    for name, value in operands.items():
        if isinstance(value, nn.Module):
            module = copying.deepcopy(value).to(device, parameter_dtype)
            for parameter in module.parameters():
                parameter.data = parameter.data.contiguous(memory_format=memory_format_of(case.layout, parameter))
            placed[name] = module
        else:
            wanted = parameter_dtype if name in case.parameters else dtype
            placed[name] = map_tensors(partial(convert, dtype=wanted), value)
        for tensor in tensors_in(placed[name]):
            tensor.requires_grad_(case.backward and name in case.differentiated)
    return placed


def leaves(operands: Operands, case: Case) -> list[Tensor]:
    """The tensors whose gradient the case asks for."""
    return [tensor for name in case.differentiated for tensor in tensors_in(operands[name])] if case.backward else []


class Call:
    """One implementation bound to its operands; calling it runs forward and, where the case asks for it, backward."""

    def __init__(self, case: Case, function: Callable[..., Tensor], operands: Operands) -> None:
        self.case = case
        self.function = function
        self.operands = operands
        self.leaves = leaves(operands, case)
        self._upstream: dict[torch.dtype, Tensor] = {}

    def upstream(self, result: Tensor) -> Tensor:
        """The gradient that backward starts from: a constant for a loss, for a map always the same noise.

        The noise is rounded to the case's dtype, so that the truth in float64 starts from the same numbers. It is of
        the size of one and needs no scale of the loss.
        """
        found = self._upstream.get(result.dtype)
        if found is None:
            if result.dim() == 0:
                found = torch.full_like(result, self.case.upstream)
            else:
                generator = torch.Generator().manual_seed(UPSTREAM_SEED)
                noise = torch.randn(result.shape, generator=generator).to(DTYPES[self.case.dtype])
                noise = noise.to(result.device, result.dtype)
                found = noise.contiguous(memory_format=memory_format_of(self.case.layout, result))
            self._upstream[result.dtype] = found
        return found

    def drop_gradients(self) -> None:
        """Free the gradients of the previous run, so that backward writes instead of adding."""
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> Tensor:
        if not self.case.backward:
            with torch.no_grad():
                return self.function(**self.operands)
        result = self.function(**self.operands)
        torch.autograd.backward(result, self.upstream(result))
        return result.detach()


def truth(case: Case, operands: Operands) -> tuple[Tensor, list[Tensor]]:
    """The formula in float64 on the rounded operands: (loss, gradients)."""
    device = str(tensors_in(next(iter(operands.values())))[0].device)
    call = Call(case, case.original, place(operands, case, torch.float64, device))
    loss = call()
    return loss, [leaf.grad for leaf in call.leaves if leaf.grad is not None]


def largest(exact: Tensor) -> float:
    """max |exact|, what errors are relative to; 1 where all is zero."""
    return (exact.abs().max().item() if exact.numel() else 0.0) or 1.0


def relative_error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact| / max |exact|; NaN when anything is not finite."""
    if exact.numel() == 0:
        return 0.0
    difference = (value.double() - exact).abs().max().item()
    return difference / largest(exact) if math.isfinite(difference) else math.nan


def gradient_floor(dtype: str, exact: Tensor) -> float:
    """One rounding to `dtype` (at least 16 of float32's); half a subnormal step where the numbers are that small."""
    information = torch.finfo(DTYPES[dtype])
    return max(LOSS_FLOOR, information.eps, 0.5 * information.smallest_normal * information.eps / largest(exact))


def result_floor(case: Case, exact: Tensor) -> float:
    """What the result may err: a loss is float32 whatever the inputs are; a map, or a network's logits, are rounded."""
    return LOSS_FLOOR if exact.dim() == 0 and not case.chain else gradient_floor(case.dtype, exact)


def gradient_floors(case: Case, exact_gradients: Sequence[Tensor]) -> list[float]:
    """What each gradient may err beyond eager's; a chain's are one vector."""
    floors = [gradient_floor(case.dtype, gradient) for gradient in exact_gradients]
    return [max(floors)] if case.chain else floors


def vector_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||value - exact|| / ||exact|| of all the tensors together; NaN when anything is not finite."""
    difference = math.sqrt(
        sum((value.double() - true).square().sum().item() for value, true in zip(values, exact, strict=True))
    )
    length = math.sqrt(sum(true.square().sum().item() for true in exact)) or 1.0
    return difference / length if math.isfinite(difference) else math.nan


@dataclass(frozen=True)
class Errors:
    """Errors against float64: of the loss (or the map that the case computes), and of each gradient."""

    loss: float
    gradients: tuple[float, ...]

    @property
    def gradient(self) -> float | None:
        """The worst gradient; NaN if one is; None when there are none."""
        if not self.gradients:
            return None
        return math.nan if any(map(math.isnan, self.gradients)) else max(self.gradients)

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return not any(map(math.isnan, (self.loss, *self.gradients)))


def errors_of(call: Call, exact_loss: Tensor, exact_gradients: Sequence[Tensor]) -> Errors:
    """Run `call` once and compare it with the truth.

    Raises:
        ValueError: when a gradient is missing or has another shape or dtype than its tensor.
    """
    call.drop_gradients()
    loss = call()
    found = []
    for index, leaf in enumerate(call.leaves):
        if leaf.grad is None:
            raise ValueError(f"the differentiated tensor number {index} got no gradient.")
        found.append(leaf.grad)
    if call.case.chain:
        gradients = [vector_error(found, exact_gradients)]
    else:
        gradients = [relative_error(gradient, exact) for gradient, exact in zip(found, exact_gradients, strict=True)]
    call.drop_gradients()
    return Errors(relative_error(loss, exact_loss), tuple(gradients))


def within(
    errors: Errors,
    eager: Errors,
    gradient_floors: Sequence[float],
    floor_of_result: float = LOSS_FLOOR,
    slack: float = 1.0,
) -> bool:
    """The three-way rule: no error above `slack` times eager's in the same dtype plus the floor.

    The floor alone where eager is NaN.
    """

    def allowed(baseline: float, floor: float) -> float:
        return floor if math.isnan(baseline) else slack * baseline + floor

    if not errors.finite or errors.loss > allowed(eager.loss, floor_of_result):
        return False
    pairs = zip(errors.gradients, eager.gradients, gradient_floors, strict=True)
    return all(error <= allowed(baseline, floor) for error, baseline, floor in pairs)


def synchronise(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def page_faults() -> int:
    """Pages this process had to be given so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Clock:
    """Times single calls: perf_counter on a CPU, events on a GPU (whose L2 cache is overwritten before each call)."""

    def __init__(self, device: str) -> None:
        self.device = device
        # Writing it also keeps the GPU busy while the host queues the call, so that launches are hidden if they can be.
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Time of one call."""
        if self._flush is None:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


class CopyMeter:
    """Bandwidth of `Tensor.copy_` between two buffers bigger than any cache, read + write counted."""

    def __init__(self, device: str, clock: Clock, megabytes: int | None = None) -> None:
        size = (megabytes or (1024 if device == "cuda" else 256)) << 20
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.destination = torch.zeros(size, dtype=torch.uint8, device=device)
        self.clock = clock
        self.samples: list[float] = []  # GB/s
        self._copy()

    def _copy(self) -> None:
        self.destination.copy_(self.source)

    def measure(self, copies: int = 3) -> float:
        """Median GB/s of `copies` copies; every sample is kept."""
        samples = [2 * self.source.numel() / 1e6 / self.clock.milliseconds(self._copy) for _ in range(copies)]
        self.samples += samples
        return statistics.median(samples)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the timed region."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(
    calls: dict[str, Call], clock: Clock, target_seconds: float, repeats: int | None
) -> dict[str, list[tuple[float, int]]]:
    """(milliseconds, page faults) of every run; a round runs every implementation once, each time another one first."""
    names = list(calls)
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in names}

    def run(name: str) -> tuple[float, int]:
        calls[name].drop_gradients()
        faults = page_faults()
        milliseconds = clock.milliseconds(calls[name])
        sample = milliseconds, page_faults() - faults
        calls[name].drop_gradients()
        return sample

    with no_garbage_collection():
        # Every implementation has run once already, to be checked.
        seconds = sum(run(name)[0] for name in names) / 1e3
        if seconds < 0.1:
            seconds = sum(run(name)[0] for name in names) / 1e3
        if repeats is None:
            fewest = MINIMUM_RUNS if seconds < 1.0 else MINIMUM_SLOW_RUNS
            repeats = max(fewest, min(MAXIMUM_RUNS, int(target_seconds / max(seconds, 1e-6))))
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(run(name))
    return samples


def extra_memory(call: Call, device: str) -> int:
    """Highest number of bytes allocated by one call beyond what was there before, gradients included.

    On a CPU the profiler traces every allocation and release of PyTorch's allocator; memory that a kernel takes from
    the C++ heap by itself is not in it.
    """
    call.drop_gradients()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        peak = peak_of_trace(events)
    call.drop_gradients()
    return peak


def peak_of_trace(events: Iterable[dict[str, Any]]) -> int:
    """Highest running sum of the profiler's memory events on the CPU, in bytes."""
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    current = peak = 0
    for event in sorted(memory, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0))):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


def host_microseconds(call: Call, device: str, runs: int = 50) -> float:
    """Median time until a call returns; on a GPU without waiting for it, on a CPU the operands should be tiny.

    Fewer runs where they would take more than a second.
    """
    times: list[float] = []
    with no_garbage_collection():
        for _ in range(runs + 10):
            if len(times) > 15 and sum(times) > 1e6:
                break
            call.drop_gradients()
            synchronise(device)
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
    synchronise(device)
    call.drop_gradients()
    return statistics.median(times[10:])


def first_sentence(error: BaseException, length: int = 160) -> str:
    """What an exception says, on one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip()[:length]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` in its default mode for one shape; forgets what was compiled before, which counts to a limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def build(case: Case, name: str) -> Callable[..., Tensor]:
    """The function of implementation `name`."""
    if name == "eager":
        return case.original
    return compiled(case.original) if name == "compile" else case.ours(name)


def agrees_in_float64(case: Case, function: Callable[..., Tensor], device: str) -> bool:
    """Whether `function` in float64 gives the truth on the tiny operands, where roundings decide nothing."""
    operands = place(case.tiny(), case, torch.float64, device)
    errors = errors_of(Call(case, function, operands), *truth(case, operands))
    return errors.finite and max(errors.loss, errors.gradient or 0.0) < EXACT


def host_time(case: Case, name: str, call: Call, settings: Settings) -> float | None:
    """Host microseconds of one implementation, by a tiny call on a CPU."""
    if settings.device == "cuda":
        return host_microseconds(call, "cuda")
    if name != "compile":
        tiny = place(case.tiny(), case, DTYPES[case.dtype], settings.device)
        return host_microseconds(Call(case, call.function, tiny), settings.device)
    key = (case.suite, case.direction)
    if key not in settings.compile_host_us and settings.host_time_of_compile and case.host_time_of_compile:
        tiny = place(case.tiny(), case, DTYPES[case.dtype], settings.device)
        settings.compile_host_us[key] = host_microseconds(Call(case, compiled(case.original), tiny), settings.device)
    return settings.compile_host_us.get(key)


def in_float32(case: Case, call: Call, settings: Settings) -> Call:
    """`call` on the same operands in float32.

    Memory that is fast in one minute and slow in the next would decide a ratio of two cases measured apart.
    """
    single = replace(case, dtype="fp32")
    return Call(single, call.function, place(case.operands(), single, torch.float32, settings.device))


def run_case(case: Case, settings: Settings, clock: Clock, copy: CopyMeter) -> list[Row]:
    """Measure every implementation of `settings` on one case."""
    dtype = DTYPES[case.dtype]
    operands = place(case.operands(), case, dtype, settings.device)
    key = (case.suite, case.shape, case.dtype)
    exact_loss, exact_gradients = settings.chain_truths.get(key) or truth(case, operands)
    if case.chain:
        settings.chain_truths[key] = exact_loss, exact_gradients
    floors = gradient_floors(case, exact_gradients)
    floor_of_result = result_floor(case, exact_loss)
    slack = CHAIN_SLACK if case.chain else 1.0
    eager_errors = errors_of(Call(case, case.original, operands), exact_loss, exact_gradients)

    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for name in settings.implementations:
        if name == "compile" and not case.compiles:
            continue
        row = rows[name] = Row(
            case.suite, case.name, case.shape, case.dtype, case.layout, case.direction, name, case.bytes_moved
        )
        begin = time.perf_counter()
        try:
            call = Call(case, build(case, name), operands)
            errors = eager_errors if name == "eager" else errors_of(call, exact_loss, exact_gradients)
            if name == "compile":
                synchronise(settings.device)
                row.compile_seconds = time.perf_counter() - begin
            right = within(errors, eager_errors, floors, floor_of_result, slack)
            if case.chain and name not in BASELINES:
                right = right and agrees_in_float64(case, call.function, settings.device)
        except Exception as error:
            row.note = first_sentence(error)
            row.status = "unavailable" if row.note.startswith("impl=") else "failed"
            continue
        row.loss_error, row.gradient_error = errors.loss, errors.gradient
        if name in BASELINES:
            worst = max(errors.loss, errors.gradient or 0.0)
            if not errors.finite:
                row.status = "NaN"
            elif worst > BASELINE_MARK:
                row.status = "inaccurate"
        elif not right:
            row.status = "WRONG"
            row.note = "the result is wrong, so it is not timed"
            continue
        calls[name] = call

    del exact_loss, exact_gradients
    copy_rate = copy.measure()
    singles: dict[str, Call] = {}
    if case.dtype != "fp32" and not case.chain:
        for name in [name for name in calls if name not in BASELINES]:
            try:
                call = in_float32(case, calls[name], settings)
                call()
            except RuntimeError:
                continue  # twice the memory may be too much
            singles[f"{name} float32"] = call
    samples = interleave({**calls, **singles}, clock, settings.target_seconds, settings.repeats) if calls else {}
    for name, call in calls.items():
        row = rows[name]
        times = sorted(milliseconds for milliseconds, _ in samples[name])
        row.ms, row.runs = statistics.median(times), len(times)
        row.ms_range = times[0], times[-1]
        if len(times) > 1:
            quartiles = statistics.quantiles(times, n=4, method="inclusive")
            row.ms_quartiles = quartiles[0], quartiles[2]
        row.page_faults = statistics.median(faults for _, faults in samples[name])
        row.gigabytes_per_second = case.bytes_moved / row.ms / 1e6
        row.copy_gigabytes_per_second = copy_rate
        row.percent_of_copy = 100.0 * row.gigabytes_per_second / copy_rate
        row.extra_bytes = extra_memory(call, settings.device)
    for name, row in rows.items():
        if row.ms is not None:
            for baseline in BASELINES:
                other = rows[baseline].ms if baseline in rows else None
                if other is not None:
                    setattr(row, f"times_{baseline}", other / row.ms)
            if f"{name} float32" in samples:
                row.times_float32 = statistics.median(ms for ms, _ in samples[f"{name} float32"]) / row.ms
            # last, because it compiles anew
            row.host_us = host_time(case, name, calls[name], settings)
    return list(rows.values())


def busy_cores(seconds: float = 0.2) -> float | None:
    """How many cores other processes use while this one sleeps; None where the system does not tell."""

    def ticks() -> tuple[int, int]:
        # "cpu" user nice system idle iowait irq softirq steal ..., summed over the cores
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        later_total, later_idle = ticks()
    except (OSError, ValueError, IndexError):
        return None
    elapsed = later_total - total
    return (elapsed - (later_idle - idle)) / elapsed * (os.cpu_count() or 1) if elapsed > 0 else None


def cpu_name() -> str:
    """The processor as the system calls it."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def environment(device: str, root: Path) -> dict[str, Any]:
    """What a result has to be read together with: machine and versions."""
    import importlib.metadata
    import importlib.util
    import platform
    import subprocess

    def git(*arguments: str) -> str:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return answer.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    import frskd_fast

    result: dict[str, Any] = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "frskd_fast": frskd_fast.__version__,
        "commit": commit or "unknown",
    }
    if device == "cuda":
        result["cuda"] = torch.version.cuda or f"HIP {torch.version.hip}"
    return result
