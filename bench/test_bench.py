"""Two cases of the benchmark for pytest-benchmark: `pytest bench --benchmark-autosave`, later `--benchmark-compare`."""

from __future__ import annotations

from typing import Any

import pytest

from bench import measure
from bench.call import Call, place
from bench.case import DTYPES, Case, Selection
from bench.cases import cases_of
from bench.correctness import Judge

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install pytest-benchmark")

# what users pass: eager PyTorch for scale, and the implementation that is chosen by itself
IMPLEMENTATIONS = ("eager", "auto")


def chosen(suite: str, shape: str) -> Case:
    """The float32 NCHW case of one shape."""
    selection = Selection(dtypes=("fp32",), layouts=("nchw",), quick=True)
    return next(case for case in cases_of(suite, selection) if case.shape == shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("suite", "shape"), [("loss", "N=128 K=100"), ("logits", "128x100")])
def test_speed(benchmark: Any, suite: str, shape: str, implementation: str) -> None:
    """Forward and backward; the gradients of the last round are dropped before the next one starts."""
    case = chosen(suite, shape)
    operands = place(case.operands(), case, DTYPES[case.dtype], "cpu")
    judge = Judge(case, operands)
    call = Call(case, measure.build(case, implementation), operands)
    assert judge.right(judge.errors(call))
    benchmark.extra_info["bytes_moved"] = case.bytes_moved
    benchmark.pedantic(call, setup=call.drop_gradients, rounds=20, warmup_rounds=3)
