"""Operation ``combine``: every implementation that runs here, and the operator for compiled graphs."""

from __future__ import annotations

import pytest
import torch
from problems import Problem
from problems.combine import PROBLEMS, solve


@pytest.mark.parametrize("implementation", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_problems(problem: Problem, implementation: str) -> None:
    problem.run(implementation, "cpu")


@pytest.mark.parametrize("split", [False, True])
def test_the_operator_passes_opcheck(split: bool) -> None:
    losses = torch.rand(3, 5), torch.rand(4, 7)
    torch.library.opcheck(torch.ops.frskd_fast.combine_forward.default, (*losses, 2.0, 100.0, True, split, "cpu"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    losses = torch.rand(4, 600), torch.rand(4, 40_000)
    before = torch.get_num_threads()
    alone = solve(*losses, True, "cpu")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(solve(*losses, True, "cpu"), alone)
    finally:
        torch.set_num_threads(before)
