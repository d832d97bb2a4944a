"""Times calls: clocks, interleaved rounds, the bandwidth of a copy, and the host's share of a call."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from bench.call import Call

Sample = TypeVar("Sample")
MINIMUM_RUNS, MAXIMUM_RUNS = 5, 200
MINIMUM_SLOW_RUNS = 3  # of each implementation, where one round of all takes more than a second


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


def one_run(call: Call, clock: Clock) -> tuple[float, int]:
    """(milliseconds, page faults) of one call; the gradients of the run before are freed, and so are its own."""
    call.drop_gradients()
    faults = page_faults()
    milliseconds = clock.milliseconds(call)
    sample = milliseconds, page_faults() - faults
    call.drop_gradients()
    return sample


def take_turns(turns: Mapping[str, Callable[[], Sample]], rounds: int, rotate: bool) -> dict[str, list[Sample]]:
    """What every turn gave: a round has each of them once, and with `rotate` each time another one first."""
    names = list(turns)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names) if rotate else 0
        for name in names[start:] + names[:start]:
            samples[name].append(turns[name]())
    return samples


def rounds_within(target_seconds: float, seconds: float, fewest: int, most: int) -> int:
    """How many rounds of `seconds` fit."""
    return max(fewest, min(most, int(target_seconds / max(seconds, 1e-6))))


def interleave(
    calls: dict[str, Call], clock: Clock, target_seconds: float, repeats: int | None
) -> dict[str, list[tuple[float, int]]]:
    """(milliseconds, page faults) of every run; the implementations take turns."""
    turns = {name: partial(one_run, call, clock) for name, call in calls.items()}
    with no_garbage_collection():
        # Every implementation has run once already, to be checked.
        seconds = sum(turn()[0] for turn in turns.values()) / 1e3
        if seconds < 0.1:
            seconds = sum(turn()[0] for turn in turns.values()) / 1e3
        fewest = MINIMUM_RUNS if seconds < 1.0 else MINIMUM_SLOW_RUNS
        return take_turns(turns, repeats or rounds_within(target_seconds, seconds, fewest, MAXIMUM_RUNS), rotate=True)


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


def quartiles(samples: Sequence[float]) -> tuple[float, float] | None:
    """The first and the third; None of a single sample."""
    if len(samples) < 2:
        return None
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third
