"""What every implementation of an operation has to get right, declared once in tests/problems/<operation>.py.

Such a module has `PROBLEMS`, a list of `Problem`s, and, where there are Triton kernels, `COMPILED`, a dict from a name to a
callable that launches the raw Triton functions with the block shapes of real calls. `RAW_PROBLEMS` are `Problem`s of
implementations that have raw functions, which plain PyTorch has not. `GRID` names those of `PROBLEMS` that are crossings of
layouts, dtypes and sizes, of which a slow implementation takes some; all others are special cases, which every implementation
runs. Whoever tests an implementation (the test of the operation, the CUDA emulation, the device check) runs
`of_implementation`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Protocol

from frskd_fast import _dispatch


class Problem(Protocol):
    """One call with everything that is to be seen of it: results, gradients, untouched inputs, written memory."""

    @property
    def name(self) -> str: ...

    def run(self, implementation: str, device: str) -> None:
        """Raises an AssertionError where `implementation` gets it wrong on `device`."""


def operations() -> list[str]:
    """Names of the operations that have problems."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module_of(operation: str) -> ModuleType:
    """The module with the problems of `operation`."""
    return importlib.import_module(f"{__name__}.{operation}")


def problems(operation: str) -> Sequence[Problem]:
    """The problems of `operation`."""
    found: Sequence[Problem] = module_of(operation).PROBLEMS
    return found


def of_kernels(operation: str) -> Sequence[Problem]:
    """The problems of `operation` that every implementation but plain PyTorch has to solve."""
    raw: Sequence[Problem] = getattr(module_of(operation), "RAW_PROBLEMS", ())
    return [*problems(operation), *raw]


def of_implementation(name: str, most_of_grids: int | None = None) -> Iterator[tuple[str, Problem]]:
    """Each operation of which ``name`` has raw functions, with each of its problems.

    Of a grid with more than ``most_of_grids`` problems about so many are taken, spread evenly.
    """
    for operation in operations():
        module = module_of(operation)
        if _dispatch.implements(operation, name):
            grid = getattr(module, "GRID", ())
            step = max(1, len(grid) // most_of_grids) if most_of_grids else 1
            skipped = {id(problem) for place, problem in enumerate(grid) if place % step}
            for problem in of_kernels(operation):
                if id(problem) not in skipped:
                    yield operation, problem


def compiled(operation: str) -> dict[str, Callable[[], None]]:
    """Launches of the Triton kernels of `operation`, by name."""
    found: dict[str, Callable[[], None]] = getattr(module_of(operation), "COMPILED", {})
    return found
