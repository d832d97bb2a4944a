"""Two cases of the benchmark for pytest-benchmark: `pytest bench --benchmark-autosave`, later `--benchmark-compare`."""

from __future__ import annotations

from typing import Any

import pytest

from bench import harness
from bench.cases import cases_of

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install pytest-benchmark")

# what users pass: eager PyTorch for scale, and the implementation that is chosen by itself
IMPLEMENTATIONS = ("eager", "auto")


def chosen(suite: str, shape: str) -> harness.Case:
    """The float32 NCHW case of one shape."""
    selection = harness.Selection(dtypes=("fp32",), layouts=("nchw",), quick=True)
    return next(case for case in cases_of(suite, selection) if case.shape == shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("suite", "shape"), [("loss", "N=128 K=100"), ("logits", "128x100")])
def test_speed(benchmark: Any, suite: str, shape: str, implementation: str) -> None:
    """Forward and backward; the gradients of the last round are dropped before the next one starts."""
    case = chosen(suite, shape)
    operands = harness.place(case.operands(), case, harness.DTYPES[case.dtype], "cpu")
    exact_loss, exact_gradients = harness.truth(case, operands)
    eager_errors = harness.errors_of(harness.Call(case, case.original, operands), exact_loss, exact_gradients)
    call = harness.Call(case, harness.build(case, implementation), operands)
    floors = [harness.gradient_floor(case.dtype, gradient) for gradient in exact_gradients]
    assert harness.within(harness.errors_of(call, exact_loss, exact_gradients), eager_errors, floors)
    benchmark.extra_info["bytes_moved"] = case.bytes_moved
    benchmark.pedantic(call, setup=call.drop_gradients, rounds=20, warmup_rounds=3)
