"""The suites: every file of this folder is one and offers `cases(selection) -> list[Case]`; nothing lists them by hand.

A full run takes them by their `ORDER` (0 where a file has none: operations), then by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.case import Case, Program, Selection

SUITES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def _module(suite: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{suite}")


def in_order(suites: tuple[str, ...] = SUITES) -> list[str]:
    """The suites of a full run, in their order; those with `ONLY_BY_NAME` are left out."""
    found = [suite for suite in suites if not getattr(_module(suite), "ONLY_BY_NAME", False)]
    return sorted(found, key=lambda suite: (getattr(_module(suite), "ORDER", 0), suite))


def cases_of(suite: str, selection: Selection) -> list[Case | Program]:
    """The cases of one suite that `selection` leaves, in the order in which they run."""
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}, but the known suites are {', '.join(SUITES)}.")
    return list(_module(suite).cases(selection))
