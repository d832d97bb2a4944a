"""Where the time of a training step goes: student, self-teacher and loss, from one profiled step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from bench.call import Call
from bench.timing import synchronise

# How the profile names what autograd runs, and how we name what the networks run.
BACKWARD, MARK = "autograd::engine::evaluate_function: ", "part: "
PARTS = (
    "student",
    "self-teacher: convolutions",
    "self-teacher: normalisation and fusion",
    "self-teacher: rest",
    "loss",
)
CONVOLUTION = ("conv", "mm", "matmul", "linear", "mkldnn")
FUSION = (
    "batch_norm", "relu", "threshold", "mul", "add", "div", "sum", "upsample", "interpolate", "pool", "pad", "fusion",
)  # fmt: skip


def shares_of(call: Call) -> dict[str, float]:
    """Share of one step's operations by part, from the profiler; backward counts where its forward was."""
    device = call.operands["images"].device.type
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with marked(call.operands), torch.profiler.profile(activities=activities) as profile:
        call.drop_gradients()
        call()
        synchronise(device)
    call.drop_gradients()
    return shares(profile.events(), device)


@contextlib.contextmanager
def marked(operands: dict[str, Any]) -> Iterator[None]:
    """Names what the networks do in the profile: hooks around their forward, a mark around the original's order."""
    from bench.cases import self_teacher

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
    for name in ("backbone", "self_teacher"):
        mark = f"{MARK}{'student' if name == 'backbone' else 'self-teacher'}"
        handles += [
            operands[name].register_forward_pre_hook(begin(mark)),
            operands[name].register_forward_hook(end),
        ]
    # The original's order is no module's forward, which a hook could mark.
    original = torch.profiler.record_function(f"{MARK}self-teacher")(self_teacher.original)
    try:
        with mock.patch.object(self_teacher, "original", original):
            yield
    finally:
        for handle in handles:
            handle.remove()


def category(name: str) -> str | None:
    """Which part of the self-teacher an operation of this name is; None: look at what it calls."""
    name = name.removeprefix(BACKWARD)
    bare = name.lower().rsplit("::", 1)[-1]
    if name.startswith("aten::") and any(word in bare for word in CONVOLUTION):
        return PARTS[1]
    if name.startswith(("aten::", "frskd_fast")) and any(word in bare for word in FUSION):
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
