"""One side of a comparison of commits: imports one frskd_fast and checks and times cases when bench/compare.py asks.

A request is a line of JSON on standard input, {"do": name, ...}; the answer is a line of JSON on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import traceback
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Last: the frskd_fast to measure comes from PYTHONPATH, and this file's folder is on the path of neither side.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import machine

machine.forget_warm_environment()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import frskd_fast  # noqa: E402
from bench import measure, timing  # noqa: E402
from bench.call import Call, tensors_in  # noqa: E402
from bench.case import Case, Selection  # noqa: E402
from bench.cases import cases_of  # noqa: E402


def checksum(tensors: Iterable[Tensor]) -> int:
    """Equal for equal bits, in whatever memory format."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy(), found)
    return found


def fingerprint(call: Call) -> int:
    """Checksum of the result and of every gradient."""
    call.drop_gradients()
    result = call()
    gradients = [leaf.grad for leaf in call.leaves if leaf.grad is not None]
    found = checksum([result, *gradients])
    call.drop_gradients()
    return found


class Worker:
    """Holds the cases, and the one that was prepared last."""

    cases: list[Case]
    settings: measure.Settings
    clock: timing.Clock
    prepared = measure.Prepared()

    def start(self, selection: dict[str, Any], suites: list[str], implementations: list[str], threads: int) -> Any:
        """Build the list of cases, which is the same on both sides."""
        if threads:
            torch.set_num_threads(threads)
        chosen = Selection(**{name: tuple(v) if isinstance(v, list) else v for name, v in selection.items()})
        self.cases = [case for suite in suites for case in cases_of(suite, chosen) if isinstance(case, Case)]
        self.settings = measure.Settings(device=chosen.device, implementations=tuple(implementations))
        self.clock = timing.Clock(chosen.device)
        return {"package": frskd_fast.__file__, "cases": [case.name for case in self.cases]}

    def prepare(self, case: int) -> Any:
        """Check every implementation of a case; the rows, checksums of what went in and of what came out."""
        self.prepared = measure.Prepared()  # frees the case before
        self.prepared = measure.prepare(self.cases[case], self.settings)
        calls = self.prepared.calls
        operands = [value for call in list(calls.values())[:1] for value in call.operands.values()]
        return {
            "rows": {name: dataclasses.asdict(row) for name, row in self.prepared.rows.items()},
            "inputs": checksum(tensor for value in operands for tensor in tensors_in(value)),
            "bits": {name: fingerprint(call) for name, call in calls.items()},
        }

    def turn(self, implementation: str, seconds: float) -> float:
        """Median milliseconds of the calls that fit into `seconds`; before several, one brings back the caches."""
        call = self.prepared.calls[implementation]
        times: list[float] = []
        left = 1e3 * seconds
        with timing.no_garbage_collection():
            while left > 0:
                times.append(timing.one_run(call, self.clock)[0])
                left -= times[-1]
        return statistics.median(times[1:] or times)


def main() -> None:
    """Answer until standard input ends."""
    # Libraries may print; what they say goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"is": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": measure.first_sentence(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
