"""A whole training step on cifarresnet18: plain cross-entropy, FRSKD in the original's order of operations, and ours.

A step is forward, loss and backward, up to the gradients of every parameter. The optimiser is left out: it is the same
for every row, and the self-teacher's parameters cost it the same in the original and in ours.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness, inputs
from bench.cases import loss as objective
from bench.cases import self_teacher as self_teacher_case

BATCH = 32
SUITE = "step"
# A row that compares with nothing else: as the method's code is shipped.
SHIPPED = ("original", "fp32", "nchw")
# How the profile names what autograd runs, and how we name what the networks run.
BACKWARD, MARK = "autograd::engine::evaluate_function: ", "part: "
PARTS = (
    "student",
    "self-teacher: convolutions",
    "self-teacher: normalisation and fusion",
    "self-teacher: rest",
    "loss",
)


@dataclass(frozen=True)
class Variant:
    """What a row measures."""

    name: str
    method: str  # plain | original | ours
    compiled: bool = False
    memory: str = "normal"


VARIANTS = (
    Variant("plain", "plain"),
    Variant("original", "original"),
    Variant("ours", "ours"),
    Variant("ours memory=low", "ours", memory="low"),
    Variant("plain compiled", "plain", compiled=True),
    Variant("original compiled", "original", compiled=True),
    Variant("ours compiled", "ours", compiled=True),
)


@dataclass(frozen=True)
class Setting:
    """Where all variants are measured side by side."""

    dtype: str
    layout: str
    variants: tuple[Variant, ...]

    def name(self, batch: int) -> str:
        """Unique over all suites."""
        return f"{SUITE} N={batch} {self.dtype} {self.layout}"


@dataclass
class StepRow:
    """One variant in one setting; figures are absent where there is nothing true to say."""

    case: str
    dtype: str
    layout: str
    implementation: str
    batch: int
    suite: str = SUITE
    status: str = "ok"  # ok | WRONG (not timed) | unavailable | failed
    note: str = ""
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    runs: int = 0
    images_per_second: float | None = None
    times_plain: float | None = None  # this median / that of plain, eager, in the same setting
    times_shipped: float | None = None  # the median of the original as shipped / this one
    times_eager: float | None = None  # the original's median in the same setting / this one
    times_compile: float | None = None  # the same with the compiled original
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    parts_ms: dict[str, float] | None = None


@dataclass
class Problem:
    """The networks that every variant starts from, and one batch; float32 NCHW on the CPU."""

    backbone: nn.Module
    self_teacher: nn.Module
    images: Tensor
    targets: Tensor


def problem(batch: int, backbone: nn.Module | None = None) -> Problem:
    """Fresh networks and a batch of digit images; another backbone with `.channels` makes a smaller problem for tests."""
    from frskd_fast.models import cifarresnet18

    images, targets, _ = inputs.digit_images(batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        backbone = cifarresnet18(num_classes=inputs.CLASSES) if backbone is None else backbone
    channels: Any = backbone.channels
    return Problem(backbone, self_teacher_case.seeded(channels, inputs.CLASSES), images, targets)


class Step:
    """One variant bound to its own copy of the networks; `forward()` gives the loss, calling it runs the whole step."""

    def __init__(self, variant: Variant, setting: Setting, given: Problem, device: str, impl: str = "auto") -> None:
        self.setting = setting
        self.device = device
        self.impl = impl
        double = setting.dtype == "fp64"
        dtype = torch.float64 if double else torch.float32
        # The original's order is no module's forward, which a hook could mark in a profile.
        self.mark_of_self_teacher: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.half = setting.dtype if setting.dtype in ("bf16", "fp16") else None
        channels_last = setting.layout == "channels_last"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.images = given.images.to(device, dtype).contiguous(memory_format=memory_format)
        self.targets = given.targets.to(device)
        self.backbone = copy.deepcopy(given.backbone).to(device, dtype)
        self.self_teacher = copy.deepcopy(given.self_teacher).to(device, dtype)
        modules: Any = (self.backbone, self.self_teacher)
        for module in modules:
            module.to(memory_format=memory_format)

        if variant.method == "ours":
            from frskd_fast.tasks import FRSKDTask

            task = FRSKDTask(self.backbone, self.self_teacher, memory=variant.memory, channels_last=channels_last)
            if variant.compiled:
                task.compile()
            self.computed: Callable[[], Tensor] = lambda: task(self.images, self.targets)["loss"]
        else:
            function = self.plain if variant.method == "plain" else self.original
            if variant.compiled:
                function = torch.compile(function, dynamic=False)
            self.computed = lambda: function(self.images, self.targets)
        trained = [self.backbone] if variant.method == "plain" else [self.backbone, self.self_teacher]
        self.parameters = [parameter for module in trained for parameter in module.parameters()]

    def plain(self, images: Tensor, targets: Tensor) -> Tensor:
        """Training without distillation."""
        return F.cross_entropy(self.backbone(images)[1], targets)

    def original(self, images: Tensor, targets: Tensor) -> Tensor:
        """FRSKD in the original's order of operations."""
        features, logits = self.backbone(images)
        with self.mark_of_self_teacher():
            refined, teacher_logits = self_teacher_case.original(self.self_teacher, features)
        detached = [feature.detach() for feature in refined]
        return objective.original(logits, teacher_logits, features, detached, targets)

    def drop_gradients(self) -> None:
        """So that backward writes instead of adding."""
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self) -> Tensor:
        """The loss, under autocast for half precision."""
        import frskd_fast

        half = None if self.half is None else harness.DTYPES[self.half]
        with frskd_fast.use_impl(self.impl), torch.autocast(self.device, half or torch.bfloat16, enabled=bool(half)):
            return self.computed()

    def __call__(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss.detach()


def fixed_storages(step: Step) -> set[int]:
    """Addresses of what lies in memory anyway: parameters, buffers, the batch."""
    modules = (step.backbone, step.self_teacher)
    tensors = [step.images, step.targets]
    for module in modules:
        tensors += [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def saved_for_backward(step: Step) -> int:
    """Bytes that forward keeps for backward: every storage once, without parameters, buffers and the batch.

    Seen by PyTorch's hooks on saved tensors, so what a function would keep by other ways is not in it.
    """
    fixed = fixed_storages(step)
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # else an address could be given away a second time

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    step.drop_gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()
    del loss
    return sum(found.values())


def truth(given: Problem, device: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the original in float64."""
    return loss_and_gradients(Step(Variant("truth", "original"), Setting("fp64", "nchw", ()), given, device))


def loss_and_gradients(step: Step) -> tuple[Tensor, list[Tensor]]:
    """The first step.

    Raises:
        ValueError: when a parameter gets no gradient.
    """
    step.drop_gradients()
    loss = step()
    gradients = []
    for position, parameter in enumerate(step.parameters):
        if parameter.grad is None:
            raise ValueError(f"parameter number {position} got no gradient.")
        gradients.append(parameter.grad)
    step.drop_gradients()
    return loss, gradients


def errors(step: Step, exact: tuple[Tensor, list[Tensor]]) -> harness.Errors:
    """Errors of the first step's loss, and of all gradients as one vector."""
    loss, gradients = loss_and_gradients(step)
    return harness.Errors(harness.relative_error(loss, exact[0]), (harness.vector_error(gradients, exact[1]),))


def right(found: harness.Errors, eager: harness.Errors, dtype: str) -> bool:
    """The three-way rule as for every chain of layers (bench/harness.py)."""
    floor = max(harness.LOSS_FLOOR, torch.finfo(harness.DTYPES[dtype]).eps)
    return harness.within(found, eager, [floor], floor, harness.CHAIN_SLACK)


def agrees_in_float64(variant: Variant, layout: str, given: Problem, device: str, impl: str) -> bool:
    """Whether a variant in float64 gives the original's loss and gradients on two small images of noise."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(inputs.SEED))
    small = Problem(given.backbone, given.self_teacher, noise, torch.arange(2))
    found = errors(Step(variant, Setting("fp64", layout, ()), small, device, impl), truth(small, device))
    return found.finite and max(found.loss, *found.gradients) < harness.EXACT


def breakdown(step: Step, device: str) -> dict[str, float]:
    """Share of one step's operations by part, from the profiler; backward counts where its forward was."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        stack.enter_context(marked(step))
        profile = stack.enter_context(torch.profiler.profile(activities=activities))
        step.drop_gradients()
        step()
        harness.synchronise(device)
    step.drop_gradients()
    return shares(profile.events(), device)


@contextlib.contextmanager
def marked(step: Step) -> Iterator[None]:
    """Names what the networks do in the profile: hooks around their forward, a mark around the original's order."""
    open_marks: list[Any] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            mark = torch.profiler.record_function(name)
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    handles = []
    for name, module in ((f"{MARK}student", step.backbone), (f"{MARK}self-teacher", step.self_teacher)):
        handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end)]
    step.mark_of_self_teacher = lambda: torch.profiler.record_function(f"{MARK}self-teacher")
    try:
        yield
    finally:
        step.mark_of_self_teacher = contextlib.nullcontext
        for handle in handles:
            handle.remove()


def category(name: str) -> str | None:
    """Which part of the self-teacher an operation of this name is; None: look at what it calls."""
    name = name.removeprefix(BACKWARD)
    bare = name.lower().rsplit("::", 1)[-1]
    if name.startswith("aten::") and any(word in bare for word in ("conv", "mm", "matmul", "linear", "mkldnn")):
        return PARTS[1]
    words = (
        "batch_norm",
        "relu",
        "threshold",
        "mul",
        "add",
        "div",
        "sum",
        "upsample",
        "interpolate",
        "pool",
        "pad",
        "fusion",
    )
    if name.startswith(("aten::", "frskd_fast")) and any(word in bare for word in words):
        return PARTS[2]
    return None


def shares(events: Sequence[Any], device: str) -> dict[str, float]:
    """Time of each part relative to all of them; `events` are the profiler's."""

    def time_of(event: Any) -> float:
        return float(event.device_time_total if device == "cuda" else event.cpu_time_total)

    part_of_sequence: dict[int, str] = {}
    spent = dict.fromkeys(PARTS, 0.0)

    def book(event: Any, part: str) -> None:
        """Add an operation of `part` and what it calls."""
        if part != "self-teacher":
            spent[part] += time_of(event)
            return
        found = category(event.name)
        if found is not None:
            spent[found] += time_of(event)
            return
        below = 0.0
        for child in event.cpu_children:
            below += time_of(child)
            book(child, part)
        spent[PARTS[3]] += max(0.0, time_of(event) - below)

    def remember(event: Any, part: str) -> None:
        for child in event.cpu_children:
            if child.sequence_nr >= 0:
                # The last one with this number made the node; those before only saw it coming.
                part_of_sequence[child.sequence_nr] = part
            remember(child, part)

    events = [event for event in events if str(event.device_type).endswith("CPU")]
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith(MARK):
            part = event.name.removeprefix(MARK)
            remember(event, part)
            for child in event.cpu_children:
                book(child, part)
        elif event.name.startswith(BACKWARD):
            # What adds a gradient to a parameter's is the same for all; here there is none yet to add to.
            if "AccumulateGrad" not in event.name:
                book(event, part_of_sequence.get(event.sequence_nr, "loss"))
        elif event.cpu_parent is None:
            book(event, "loss")
    total = sum(spent.values()) or 1.0
    return {part: value / total for part, value in spent.items()}


def settings(selection: harness.Selection, implementations: Sequence[str], dtypes_named: bool) -> list[Setting]:
    """dtype x layout. Without `full` a CPU runs float32 alone, unless dtypes were named; it compiles one setting if named."""
    found = []
    dtypes = tuple(dtype for dtype in selection.dtypes if dtype != "fp16")
    if not (selection.full or dtypes_named or selection.device == "cuda"):
        dtypes = dtypes[:1]
    for dtype in dtypes:
        for layout in selection.layouts:
            compiles = "compile" in implementations and (
                selection.full
                or (selection.named and not selection.quick and dtype == "fp32" and layout == selection.layouts[-1])
            )
            variants = [
                variant
                for variant in VARIANTS
                if (compiles or not variant.compiled) and (selection.full or variant.name != "plain compiled")
            ]
            found.append(Setting(dtype, layout, tuple(variants)))
    return found


@dataclass
class Measurement:
    """How to measure, and what one setting leaves for the next."""

    device: str
    clock: harness.Clock
    impl: str = "auto"
    target_seconds: float = 1.0
    repeats: int | None = None
    plot: bool = False
    shipped_ms: float | None = None
    exact: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)


def run_setting(setting: Setting, given: Problem, measurement: Measurement) -> list[StepRow]:
    """Check, then time every variant of a setting, interleaved."""
    device, batch = measurement.device, given.images.size(0)
    if batch not in measurement.exact:
        measurement.exact[batch] = truth(given, device)
    exact = measurement.exact[batch]
    rows: dict[str, StepRow] = {}
    steps: dict[str, Step] = {}
    eager_errors: harness.Errors | None = None
    # Once, before the first one compiles: each of them is called again below.
    torch.compiler.reset()
    for variant in setting.variants:
        row = rows[variant.name] = StepRow(setting.name(batch), setting.dtype, setting.layout, variant.name, batch)
        begin = time.perf_counter()
        try:
            step = Step(variant, setting, given, device, measurement.impl)
            if variant.method == "plain":
                step()  # another loss: nothing to compare
                found = None
            else:
                found = errors(step, exact)
                row.loss_error, row.gradient_error = found.loss, found.gradient
            if variant.compiled:
                harness.synchronise(device)
                row.compile_seconds = time.perf_counter() - begin
        except Exception as error:
            row.note = harness.first_sentence(error)
            row.status = "unavailable" if "impl=" in row.note or isinstance(error, ImportError) else "failed"
            continue
        if variant.name == "original":
            eager_errors = found
        elif variant.method == "ours" and found is not None:
            good = eager_errors is not None and right(found, eager_errors, setting.dtype)
            if good and not variant.compiled:
                good = agrees_in_float64(variant, setting.layout, given, device, measurement.impl)
            if not good:
                row.status = "WRONG"
                row.note = "the result is wrong, so it is not timed"
                continue
        steps[variant.name] = step

    calls: Any = steps
    samples = harness.interleave(calls, measurement.clock, measurement.target_seconds, measurement.repeats)
    for name, step in steps.items():
        row = rows[name]
        times = sorted(milliseconds for milliseconds, _ in samples[name])
        row.ms, row.runs = statistics.median(times), len(times)
        if len(times) > 1:
            quartiles = statistics.quantiles(times, n=4, method="inclusive")
            row.ms_quartiles = quartiles[0], quartiles[2]
        row.images_per_second = 1e3 * batch / row.ms
        row.saved_bytes = saved_for_backward(step)
        row.peak_bytes = harness.extra_memory(calls[name], device)
        if measurement.plot and name in ("plain", "original", "ours"):
            row.parts_ms = {part: share * row.ms for part, share in breakdown(step, device).items()}
        if (name, setting.dtype, setting.layout) == SHIPPED:
            measurement.shipped_ms = row.ms
    for row in rows.values():
        compare(row, rows, measurement)
    return list(rows.values())


def compare(row: StepRow, rows: dict[str, StepRow], measurement: Measurement) -> None:
    """Fill in the ratios of a timed row."""
    if row.ms is None:
        return

    def of(name: str) -> float | None:
        return rows[name].ms if name in rows else None

    plain, eager, compile_ms = of("plain"), of("original"), of("original compiled")
    row.times_plain = None if plain is None else row.ms / plain
    row.times_shipped = None if measurement.shipped_ms is None else measurement.shipped_ms / row.ms
    if not row.implementation.startswith("plain"):
        row.times_eager = None if eager is None else eager / row.ms
        row.times_compile = None if compile_ms is None else compile_ms / row.ms
