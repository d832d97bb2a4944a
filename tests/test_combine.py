"""Operation ``combine``: every implementation that runs here, and the operator for compiled graphs."""

from __future__ import annotations

import pytest
import torch
from problems.combine import PROBLEMS, Combine, NanIsNotHidden, NoValidRow

from frskd_fast import _dispatch


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton", "auto"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
# The interpreter computes masked lanes too: 0 / 0 is a warning of numpy there.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_problems(problem: Combine | NoValidRow | NanIsNotHidden, implementation: str) -> None:
    reason = _dispatch.problem(implementation, "cpu", torch.float32) if implementation != "auto" else None
    if reason is not None:
        pytest.skip(reason)
    problem.run(implementation, "cpu")


@pytest.mark.parametrize("split", [False, True])
def test_the_operator_passes_opcheck(split: bool) -> None:
    losses = torch.rand(3, 5), torch.rand(4, 7)
    torch.library.opcheck(torch.ops.frskd_fast.combine.default, (*losses, 2.0, 100.0, True, split, "cpu"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    from problems.combine import solve

    losses = torch.rand(4, 600), torch.rand(4, 40_000)
    before = torch.get_num_threads()
    alone = solve(*losses, True, "cpu")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(solve(*losses, True, "cpu"), alone)
    finally:
        torch.set_num_threads(before)
