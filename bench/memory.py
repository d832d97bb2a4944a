"""Bytes that a call allocates at most, and bytes that its forward pass keeps for backward."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.call import Call, tensors_in


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


def saved_for_backward(call: Call) -> int:
    """Bytes that forward keeps for backward: every storage once, without the operands (parameters, buffers, the batch).

    Seen by PyTorch's hooks on saved tensors, so what a function would keep by other ways is not in it.
    """
    operands = list(call.operands.values())
    fixed = [tensor for value in operands for tensor in tensors_in(value)]
    fixed += [buffer for value in operands if isinstance(value, nn.Module) for buffer in value.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # else an address could be given away a second time

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    call.drop_gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call.forward()
    del result
    return sum(found.values())
