"""What the CUDA operations cannot index they refuse, with a sentence, before anything is written; run in the emulation."""

from __future__ import annotations

from typing import Any

import emulation
import pytest
import torch

pytestmark = pytest.mark.skipif(emulation.problem() is not None, reason=str(emulation.problem()))


def _attention_arguments() -> dict[str, Any]:
    return {
        "students": [torch.randn(2, 3, 4, 4)],
        "teachers": [torch.randn(2, 5, 4, 4)],
        "exponent": 2.0,
        "losses": torch.empty(1, 2),
        "student_coefficients": torch.empty(32),
        "teacher_coefficients": None,
        "workspace": torch.empty(64),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("students", [], "students is empty"),
        ("teachers", [], "teachers has 0 tensors, but 1 were wanted"),
        ("teachers", [torch.zeros(2, 5, 4, 5)], "equal heights and widths were wanted"),
        ("teachers", [torch.zeros(3, 5, 4, 4)], "batch size 3, but 2"),
        ("teachers", [torch.zeros(2, 5, 16)], r"has shape \(2, 5, 16\), but \(N, C, H, W\)"),
        ("teachers", [torch.zeros(2, 5, 4, 4, dtype=torch.float64)], "has dtype Double, but Float"),
        ("students", [torch.zeros(2, 0, 4, 4)], "at least one channel and one pixel"),
        ("losses", torch.zeros(2, 1), r"losses has shape \(2, 1\), but \(1, 2\)"),
        ("losses", torch.zeros(1, 2, dtype=torch.float64), "losses has dtype Double"),
        ("student_coefficients", torch.zeros(31), r"student_coefficients has shape \(31\), but \(32\)"),
        ("student_coefficients", torch.zeros(64)[::2], "student_coefficients is not contiguous"),
        ("workspace", torch.zeros(63), r"workspace has shape \(63\), but \(64\)"),
    ],
)
def test_attention_refuses_what_it_could_not_index(name: str, value: Any, message: str) -> None:
    arguments = _attention_arguments()
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().attention_forward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad", torch.zeros(2, 1), r"grad has shape \(2, 1\), but \(1, 2\)"),
        ("features", [], "features is empty"),
        ("coefficients", torch.zeros(16), r"coefficients has shape \(16\), but \(32\)"),
        ("gradients", [], "gradients has 0 tensors, but 1"),
        ("gradients", [torch.zeros(2, 3, 4, 5)], r"gradients\[0\] has shape \(2, 3, 4, 5\), but \(2, 3, 4, 4\)"),
        ("gradients", [torch.zeros(2, 3, 4, 4).half()], "has dtype Half, but Float"),
    ],
)
def test_attention_backward_refuses_what_it_could_not_index(name: str, value: Any, message: str) -> None:
    arguments = {
        "grad": torch.ones(1, 2),
        "scale": 1.0,
        "features": [torch.randn(2, 3, 4, 4)],
        "coefficients": torch.zeros(32),
        "exponent": 2.0,
        "gradients": [torch.zeros(2, 3, 4, 4)],
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().attention_backward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("students", [], "students is empty"),
        ("students", [torch.zeros(4)], r"students\[0\] has shape \(4\)"),
        ("students", [torch.zeros(4, 0)], "from 1 to 2\\^30 classes"),
        ("teachers", [torch.zeros(4, 5)], r"teachers\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("teachers", [torch.zeros(4, 6), torch.zeros(4, 6)], "teachers has 2 tensors, but 1"),
        ("targets", [torch.zeros(5, dtype=torch.int64)], "without the class axis was wanted"),
        ("targets", [torch.zeros(4, dtype=torch.int32)], "has dtype Int, but Float"),
        ("targets", [torch.zeros(4, 6, dtype=torch.float64)], "has dtype Double, but Float"),
        ("targets", [torch.zeros(4, 5)], r"targets\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("targets_b", [torch.zeros(4, 1, dtype=torch.int64)], "without the class axis was wanted"),
        ("temperature", 0.0, "temperature is 0"),
        ("losses", torch.zeros(4, 3), r"losses has shape \(4, 3\), but \(4, 4\)"),
        ("statistics", torch.zeros(4, 4), r"statistics has shape \(4, 4\), but \(6, 4\)"),
        ("inverse_valid", torch.zeros(2), r"inverse_valid has shape \(2\), but \(1\)"),
    ],
)
def test_logits_refuses_what_it_could_not_index(name: str, value: Any, message: str) -> None:
    arguments = {
        "students": [torch.zeros(4, 6)],
        "teachers": [torch.zeros(4, 6)],
        "targets": [torch.zeros(4, dtype=torch.int64)],
        "targets_b": [],
        "mix": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "temperature": 4.0,
        "losses": torch.zeros(4, 4),
        "statistics": torch.zeros(6, 4),
        "inverse_valid": torch.zeros(1),
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().logits_forward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grads", [torch.ones(1)] * 2, "grads has 2 tensors, but 3"),
        ("grads", [torch.ones(3)] * 3, "has 3 elements, but its last index is"),
        ("grads", [torch.ones(4, dtype=torch.float64)] * 3, "has dtype Double, but Float"),
        ("row_stride", -1, "row_stride is -1"),
        ("row_stride", 2**62, "its last index is"),
        ("scales", [1.0, 1.0], "scales has 2 numbers, but 3"),
        ("inverse_valid", torch.ones(2), r"inverse_valid has shape \(2\), but \(1\)"),
        ("losses", torch.zeros(3, 4), r"losses has shape \(3, 4\), but \(4, 4\)"),
        ("student_gradients", [torch.zeros(4, 5)], r"student_gradients\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("teachers", [], "teacher_gradients is given without teachers"),
    ],
)
def test_logits_backward_refuses_what_it_could_not_index(name: str, value: Any, message: str) -> None:
    arguments = {
        "grads": [torch.ones(4)] * 3,
        "head_stride": 0,
        "row_stride": 1,
        "scales": [1.0, 1.0, 1.0],
        "students": [torch.zeros(4, 6)],
        "teachers": [torch.zeros(4, 6)],
        "targets": [torch.zeros(4, dtype=torch.int64)],
        "targets_b": [],
        "mix": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "temperature": 4.0,
        "losses": torch.zeros(4, 4),
        "statistics": torch.zeros(6, 4),
        "inverse_valid": torch.ones(1),
        "kd_to_teacher": True,
        "student_gradients": [torch.zeros(4, 6)],
        "teacher_gradients": [torch.zeros(4, 6)],
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().logits_backward.default(*arguments.values())


def _fusion_arguments() -> dict[str, Any]:
    numbers = torch.ones(3)
    return {
        "grad": torch.ones(2, 3, 4, 4),
        "inputs": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)],
        "statistics": [torch.ones(3, 3), torch.empty(0)],
        "gammas": [numbers, torch.empty(0)],
        "betas": [numbers, torch.empty(0)],
        "weight": torch.ones(2),
        "sums": [torch.zeros(2, 3), torch.empty(0)],
        "resamples": [0, 2],
        "pre": 1,
        "weighting": 1,
        "epsilon": 1e-4,
        "positions": [0, 1],
        "gradients": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)],
        "weight_gradient": torch.ones(2),
        "workspace": torch.empty(10000),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", [], "inputs has 0 tensors, but 1 to 4"),
        ("inputs", [torch.ones(2, 3, 4, 4)] * 5, "inputs has 5 tensors"),
        ("inputs", [torch.ones(3), torch.ones(3)], r"inputs\[0\] has shape \(3\)"),
        (
            "inputs",
            [torch.ones(2, 3, 4, 4), torch.ones(2, 2, 7, 8)],
            r"inputs\[1\] has shape \(2, 2, 7, 8\), but batch",
        ),
        ("inputs", [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8).half()], r"inputs\[1\] has dtype Half, but Float"),
        ("inputs", [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 9, 8)], "a size whose half, rounded up"),
        ("inputs", [torch.ones(2, 3, 4, 5), torch.ones(2, 3, 7, 8)], "the same size was wanted"),
        ("inputs", [torch.ones(1).expand(2, 2**20, 2**10, 2)] * 2, "of at most 2\\^30 elements"),
        ("inputs", [torch.ones(1).expand(2**31, 3, 4, 4)] * 2, "at most 2\\^30 samples"),
        ("grad", torch.ones(2, 3, 4), r"grad has shape \(2, 3, 4\)"),
        ("grad", torch.ones(2, 3, 4, 4).double(), "grad has dtype Double"),
        ("resamples", [0], "resamples has 1 numbers"),
        ("resamples", [0, 3], r"resamples\[1\] is 3"),
        ("resamples", [0, 1], "at most that size"),
        ("pre", 3, "pre is 3, but a number from 0 to 2"),
        ("weighting", 3, "weighting is 3"),
        ("weight", torch.ones(3), r"weight has shape \(3\), but \(2\)"),
        ("weight", torch.ones(2).half(), "weight has dtype Half"),
        ("statistics", [torch.ones(1, 3), torch.empty(0)], r"statistics\[0\] has shape \(1, 3\)"),
        ("statistics", [torch.empty(0)] * 2, r"gammas\[0\] has 3 elements"),
        ("gammas", [torch.ones(4), torch.empty(0)], r"gammas\[0\] has shape \(4\), but \(3\)"),
        ("betas", [torch.ones(3)], "betas has 1 tensors, but 2"),
        ("sums", [torch.ones(2, 3), torch.ones(2, 3)], r"inputs\[1\] is not normalised"),
        ("sums", [torch.ones(3, 3), torch.empty(0)], r"sums\[0\] has shape \(3, 3\)"),
        ("positions", [0, 2], r"positions\[1\] is 2"),
        ("positions", [0, 0], "rising numbers"),
        ("gradients", [torch.ones(2, 3, 4, 4)], "gradients has 1 tensors, but 2"),
        ("gradients", [torch.ones(2, 3, 4, 4)] * 2, r"gradients\[1\] has shape"),
        ("weight_gradient", torch.ones(1), "weight_gradient has shape"),
        ("workspace", None, "workspace has 0 elements"),
        ("workspace", torch.empty(1), "workspace has 1 elements"),
        ("workspace", torch.empty(10000, dtype=torch.float64), "workspace has dtype Double"),
    ],
)
def test_fusion_refuses_what_it_could_not_index(name: str, value: Any, message: str) -> None:
    arguments = _fusion_arguments()
    emulation.operators().fusion_backward.default(*arguments.values())
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().fusion_backward.default(*arguments.values())
    for skipped in ("positions", "gradients"):
        del arguments[skipped]
    if name in arguments:
        order = ["grad", "inputs", "statistics", "gammas", "betas", "weight", "resamples", "pre", "weighting", "epsilon",
                 "sums", "weight_gradient", "workspace"]  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            emulation.operators().fusion_backward_sums.default(*(arguments[key] for key in order))
    if name not in ("grad", "sums", "weight_gradient", "workspace"):
        out = arguments.pop("grad")
        for skipped in ("sums", "weight_gradient", "workspace"):
            del arguments[skipped]
        if name in arguments:
            with pytest.raises(RuntimeError, match=message.replace("grad", "out")):
                emulation.operators().fusion_forward.default(*arguments.values(), out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", [], "inputs has 0 tensors"),
        ("epsilons", [1.0, 1.0], "epsilons has 2 numbers, but 1"),
        ("statistics", [torch.ones(2, 3)], r"statistics\[0\] has shape \(2, 3\), but \(3, 3\)"),
        ("workspace", torch.ones(5), "workspace has 5 elements"),
    ],
)
def test_fusion_statistics_refuse_what_they_could_not_index(name: str, value: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": [torch.ones(2, 3, 4, 4)],
        "epsilons": [1e-5],
        "statistics": [torch.ones(3, 3)],
        "workspace": torch.empty(6),
    }
    emulation.operators().fusion_statistics.default(*arguments.values())
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.operators().fusion_statistics.default(*arguments.values())
