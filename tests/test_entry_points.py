"""The C++ entry points with hostile arguments: a sentence or a result, never a crash. Also run under AddressSanitizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems._hostile import Hostile

from frskd_fast import _extension

if _extension.cpu_library_problem() is not None:
    pytest.skip(f"no C++ kernels: {_extension.cpu_library_problem()}", allow_module_level=True)

OPERATORS = torch.ops.frskd_fast_native
ROUNDS = 1500


def _assert_names_an_argument(operator: Any, message: str) -> None:
    """ "function, file:line, argument[position] ..., but ... wanted.": the sentence of an entry point."""
    names = "|".join(argument.name for argument in operator._schema.arguments)
    sentence = rf"\w+, \S+:\d+, ({names})(\[\d+\])?[ ,].*(wanted|must|given|has|names|goes).*\."
    assert re.fullmatch(sentence, message.split("\nException raised from")[0].strip()), message


ENTRY_POINTS = [
    (name, draw)
    for operation in problems.operations()
    for name, draw in getattr(problems.module_of(operation), "ENTRY_POINTS", {}).items()
]


@pytest.mark.parametrize(("name", "draw"), ENTRY_POINTS, ids=[name for name, _ in ENTRY_POINTS])
def test_hostile_arguments_end_in_a_sentence_or_a_result(name: str, draw: Callable[[Hostile], tuple[Any, ...]]) -> None:
    operator = getattr(OPERATORS, name).default
    outcomes = {"result": 0, "refused": 0}
    for seed in range(ROUNDS):
        arguments = draw(Hostile(seed))
        try:
            operator(*arguments)
            outcomes["result"] += 1
        except (RuntimeError, NotImplementedError) as error:
            # NotImplementedError: PyTorch found a tensor on another device than the CPU.
            if isinstance(error, NotImplementedError):
                assert operator.name() in str(error)
            else:
                _assert_names_an_argument(operator, str(error))
            outcomes["refused"] += 1
    # Both ends of the entry point were reached, else the test would prove nothing.
    assert min(outcomes.values()) > ROUNDS // 20, outcomes


def test_every_compiled_function_meets_them() -> None:
    functions = {
        schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("frskd_fast_native::")
    }
    toys = {"frskd_fast_native::toy"}  # of another test in the same process
    assert functions - toys == {f"frskd_fast_native::{name}" for name, _ in ENTRY_POINTS}
