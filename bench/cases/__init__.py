"""The registry of suites: one file per operation, named here, offers `cases(selection) -> list[Case]`.

The suite `step` compares whole training steps; bench/cases/step.py has rows and a runner of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Case, Selection

# name on the command line -> module; the order is that of a full run
SUITES = {
    "attention": "bench.cases.attention",
    "logits": "bench.cases.logits",
    "loss": "bench.cases.loss",
    "fusion": "bench.cases.fusion",
    "self_teacher": "bench.cases.self_teacher",
}

STEP = "step"


def cases_of(suite: str, selection: Selection) -> list[Case]:
    """The cases of one suite that `selection` leaves, in the order in which they run.

    Raises:
        ValueError: for a suite that is not registered.
    """
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}, but the known suites are {', '.join(SUITES)}.")
    return list(importlib.import_module(SUITES[suite]).cases(selection))
