"""What the operations could not index they refuse, with the same sentence on every device, before anything is written.

The CUDA operations run in the emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulation
import pytest
import torch

from frskd_fast import _extension

PROBLEMS = {"cpu": _extension.cpu_library_problem(), "emulation": emulation.problem()}
Arguments = dict[str, Any]


@pytest.fixture(params=PROBLEMS)
def operators(request: pytest.FixtureRequest) -> Any:
    """The compiled operations of one device."""
    problem = PROBLEMS[request.param]
    if problem is not None:
        pytest.skip(problem)
    return torch.ops.frskd_fast_native if request.param == "cpu" else emulation.operators()


def _attention_forward() -> Arguments:
    return {
        "students": [torch.randn(2, 3, 4, 4)],
        "teachers": [torch.randn(2, 5, 4, 4)],
        "exponent": 2.0,
        "losses": torch.empty(1, 2),
        "student_coefficients": torch.empty(32),
        "teacher_coefficients": None,
        "workspace": torch.empty(64),
    }


def _attention_backward() -> Arguments:
    return {
        "grad": torch.ones(1, 2),
        "scale": 1.0,
        "features": [torch.randn(2, 3, 4, 4)],
        "coefficients": torch.zeros(32),
        "exponent": 2.0,
        "gradients": [torch.zeros(2, 3, 4, 4)],
    }


def _heads() -> Arguments:
    return {
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


def _logits_backward() -> Arguments:
    return {
        "grads": [torch.ones(4)] * 3,
        "head_stride": 0,
        "row_stride": 1,
        "scales": [1.0, 1.0, 1.0],
        **_heads(),
        "kd_to_teacher": True,
        "student_gradients": [torch.zeros(4, 6)],
        "teacher_gradients": [torch.zeros(4, 6)],
    }


def _combine() -> Arguments:
    return {
        "attention_losses": torch.zeros(2, 4),
        "logits_losses": torch.zeros(4, 5),
        "alpha": 1.0,
        "beta": 1.0,
        "has_targets": True,
        "parts": torch.zeros(5),
        "scalars": [torch.zeros(())],
    }


def _fusion_statistics() -> Arguments:
    return {
        "inputs": [torch.ones(2, 3, 4, 4)],
        "epsilons": [1e-5],
        "statistics": [torch.ones(3, 3)],
        "workspace": torch.empty(100000),
    }


def _node() -> Arguments:
    numbers = torch.ones(3)
    return {
        "inputs": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)],
        "statistics": [torch.ones(3, 3), torch.empty(0)],
        "gammas": [numbers, torch.empty(0)],
        "betas": [numbers, torch.empty(0)],
        "weight": torch.ones(2),
    }


_FUSION_SETTINGS: Arguments = {"resamples": [0, 2], "pre": 1, "weighting": 1, "epsilon": 1e-4}
_SUMS: Arguments = {"sums": [torch.zeros(2, 3), torch.empty(0)]}
_WEIGHT: Arguments = {"weight_gradient": torch.ones(2), "workspace": torch.empty(10000)}


def _fusion_forward() -> Arguments:
    return _node() | _FUSION_SETTINGS | {"out": torch.ones(2, 3, 4, 4)}


def _fusion_backward_sums() -> Arguments:
    return {"grad": torch.ones(2, 3, 4, 4)} | _node() | _FUSION_SETTINGS | _SUMS | _WEIGHT


def _fusion_backward() -> Arguments:
    gradients = [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)]
    written = {"positions": [0, 1], "gradients": gradients}
    return {"grad": torch.ones(2, 3, 4, 4)} | _node() | _SUMS | _FUSION_SETTINGS | written | _WEIGHT


_INDICES = torch.int64

# One argument that is wrong, and the sentence about it.
REFUSALS: dict[Callable[[], Arguments], list[tuple[str, Any, str]]] = {
    _attention_forward: [
        ("students", [], "students is empty, but at least one level was wanted."),
        ("students", [torch.zeros(2, 0, 4, 4)], "students[0] has shape (2, 0, 4, 4), but at least one channel and"),
        ("students", [torch.zeros(2, 3, 4)], "students[0] has shape (2, 3, 4), but (N, C, H, W) was wanted."),
        ("students", [torch.zeros(2, 3, 4, 4).long()], "students[0] has dtype Long, but Float, BFloat16, Half or"),
        ("teachers", [], "teachers has 0 entries, but 1 were wanted."),
        ("teachers", [torch.zeros(2, 5, 4, 5)], "but the height and width of students[0] (2, 3, 4, 4) were wanted."),
        ("teachers", [torch.zeros(3, 5, 4, 4)], "teachers[0] has batch size 3, but 2"),
        ("teachers", [torch.zeros(2, 5, 16)], "teachers[0] has shape (2, 5, 16), but (N, C, H, W) was wanted."),
        ("teachers", [torch.zeros(2, 5, 4, 4).double()], "teachers[0] has dtype Double, but Float was wanted."),
        ("exponent", 0.5, "exponent is 0.5, but a finite number of at least 1 was wanted."),
        ("exponent", float("nan"), "exponent is nan"),
        ("losses", torch.zeros(2, 1), "losses has shape (2, 1), but (1, 2) was wanted."),
        ("losses", torch.zeros(1, 2).double(), "losses has dtype Double, but Float was wanted."),
        ("student_coefficients", torch.zeros(31), "student_coefficients has shape (31), but (32) was wanted."),
        ("student_coefficients", torch.zeros(64)[::2], "student_coefficients is not contiguous, but a contiguous"),
        ("teacher_coefficients", torch.zeros(32).byte(), "teacher_coefficients has dtype Byte, but Float was wanted."),
        ("workspace", torch.zeros(63), "workspace has shape (63), but (64) was wanted."),
    ],
    _attention_backward: [
        ("grad", torch.zeros(2, 1), "grad has shape (2, 1), but (1, 2) was wanted."),
        ("grad", torch.zeros(1, 2).double(), "grad has dtype Double, but Float was wanted."),
        ("features", [], "features is empty"),
        ("features", [torch.zeros(2, 3, 0, 4)], "features[0] has shape (2, 3, 0, 4), but at least one channel"),
        ("coefficients", torch.zeros(16), "coefficients has shape (16), but (32) was wanted."),
        ("exponent", float("inf"), "exponent is inf, but a finite number of at least 1 was wanted."),
        ("gradients", [], "gradients has 0 entries, but 1 were wanted."),
        ("gradients", [torch.zeros(2, 3, 4, 5)], "gradients[0] has shape (2, 3, 4, 5), but (2, 3, 4, 4) was wanted."),
        ("gradients", [torch.zeros(2, 3, 4, 4).half()], "gradients[0] has dtype Half, but Float was wanted."),
    ],
    _heads: [
        ("students", [], "students is empty, but at least one head was wanted."),
        ("students", [torch.zeros(4)], "students[0] has shape (4), but (N, K), (N, K, W) or (N, K, H, W) was wanted."),
        ("students", [torch.zeros(4, 0)], "students[0] has shape (4, 0), but from 1 to 2^30 classes were wanted."),
        ("teachers", [torch.zeros(4, 5)], "teachers[0] has shape (4, 5), but (4, 6) was wanted."),
        ("teachers", [torch.zeros(4, 6)] * 2, "teachers has 2 entries, but 1 were wanted."),
        ("targets", [torch.zeros(5, dtype=_INDICES)], "targets[0] has shape (5), but the shape of its logits (4, 6)"),
        ("targets", [torch.zeros(4, dtype=torch.int32)], "targets[0] has dtype Int, but Float was wanted."),
        ("targets", [torch.zeros(4, 6).double()], "targets[0] has dtype Double, but Float was wanted."),
        ("targets", [torch.zeros(4, 5)], "targets[0] has shape (4, 5), but (4, 6) was wanted."),
        ("targets_b", [torch.zeros(4, 1, dtype=_INDICES)], "targets_b[0] has shape (4, 1), but the shape of its"),
        ("mix", 1.5, "mix is 1.5, but a number from 0 to 1 was wanted."),
        ("label_smoothing", float("nan"), "label_smoothing is nan, but a number from 0 to 1 was wanted."),
        ("temperature", 0.0, "temperature is 0, but a finite number above 0 was wanted."),
        ("losses", torch.zeros(4, 3), "losses has shape (4, 3), but (4, 4) was wanted."),
        ("statistics", torch.zeros(4, 4), "statistics has shape (4, 4), but (6, 4) was wanted."),
        ("inverse_valid", torch.zeros(2), "inverse_valid has shape (2), but (1) was wanted."),
    ],
    _logits_backward: [
        ("grads", [torch.ones(4)] * 2, "grads has 2 entries, but 3 were wanted."),
        ("grads", [torch.ones(3)] * 3, "grads[0] has shape (3), but one axis or none, and at least 4 elements were"),
        ("grads", [torch.ones(4).double()] * 3, "grads[0] has dtype Double, but Float was wanted."),
        ("row_stride", -1, "row_stride is -1, but a number from 0 to 1 was wanted."),
        ("head_stride", 2**62, "head_stride is 4611686018427387904, but a number from 0 to 1 was wanted."),
        ("scales", [1.0, 1.0], "scales has 2 entries, but 3 were wanted."),
        ("inverse_valid", torch.ones(2), "inverse_valid has shape (2), but (1) was wanted."),
        ("losses", torch.zeros(3, 4), "losses has shape (3, 4), but (4, 4) was wanted."),
        ("student_gradients", [torch.zeros(4, 5)], "student_gradients[0] has shape (4, 5), but (4, 6) was wanted."),
        ("teachers", [], "teacher_gradients has 1 entries, but 0 were wanted."),
    ],
    _combine: [
        ("attention_losses", torch.zeros(4), "attention_losses has shape (4), but (levels, batch) was wanted."),
        ("logits_losses", torch.zeros(3, 5), "logits_losses has shape (3, 5), but (4, 5) was wanted."),
        ("logits_losses", torch.zeros(4, 5).half(), "logits_losses has dtype Half, but Float or Double was wanted."),
        ("parts", torch.zeros(5).double(), "parts has dtype Double, but Float was wanted."),
        ("scalars", [torch.zeros(())] * 2, "scalars has 2 entries, but one for the total, or three for"),
        ("scalars", [torch.zeros(1)], "scalars[0] has shape (1), but () was wanted."),
    ],
    _fusion_statistics: [
        ("inputs", [], "inputs has 0 entries, but 1 to 4 were wanted."),
        ("inputs", [torch.ones(0, 3, 4, 4)], "inputs[0] has shape (0, 3, 4, 4), but at least one sample was wanted."),
        ("epsilons", [1.0, 1.0], "epsilons has 2 entries, but 1 were wanted."),
        ("epsilons", [-1.0], "epsilons[0] is -1, but a finite number of at least 0 was wanted."),
        ("statistics", [torch.ones(2, 3)], "statistics[0] has shape (2, 3), but (3, 3) was wanted."),
    ],
}

_MAP = torch.ones(2, 3, 4, 4)
_PIXEL = torch.ones(1)
_NODE_REFUSALS: list[tuple[str, Any, str]] = [
    ("inputs", [], "inputs has 0 entries, but 1 to 4 were wanted."),
    ("inputs", [_MAP] * 5, "inputs has 5 entries, but 1 to 4 were wanted."),
    ("inputs", [torch.ones(3)] * 2, "inputs[0] has shape (3), but (N, C, H, W) was wanted."),
    ("inputs", [_MAP, torch.ones(2, 2, 7, 8)], "inputs[1] has shape (2, 2, 7, 8), but batch size 2 and 3 channels"),
    ("inputs", [_MAP, torch.ones(2, 3, 7, 8).half()], "inputs[1] has dtype Half, but Float was wanted."),
    ("inputs", [_MAP, torch.ones(2, 3, 9, 8)], " (2, 3, 4, 4) and a size whose half, rounded up, is that was wanted."),
    ("inputs", [torch.ones(2, 3, 4, 5), torch.ones(2, 3, 7, 8)], " (2, 3, 4, 4) and the same size was wanted."),
    ("inputs", [_PIXEL.expand(2, 3, 1, 2**25), _MAP], "(2, 3, 1, 33554432), but sides of at most 2^24 were wanted."),
    ("resamples", [0], "resamples has 1 entries, but 2 were wanted."),
    ("resamples", [0, 3], "resamples[1] is 3, but a number from 0 to 2 was wanted."),
    ("resamples", [0, 1], " (2, 3, 4, 4) and at most that size was wanted."),
    ("pre", 3, "pre is 3, but a number from 0 to 2 was wanted."),
    ("weighting", -1, "weighting is -1, but a number from 0 to 2 was wanted."),
    ("epsilon", -0.5, "epsilon is -0.5, but a finite number of at least 0 was wanted."),
    ("weight", torch.ones(3), "weight has shape (3), but (2) was wanted."),
    ("weight", torch.ones(2).half(), "weight has dtype Half, but Float was wanted."),
    ("statistics", [torch.ones(1, 3), torch.empty(0)], "statistics[0] has shape (1, 3), but (2, 3) or more rows were"),
    ("statistics", [torch.empty(0)] * 2, "statistics[0], gammas[0] and betas[0] have 0, 3 and 3 elements, but either"),
    ("gammas", [torch.ones(4), torch.empty(0)], "gammas[0] has shape (4), but (3) was wanted."),
    ("betas", [torch.ones(3)], "betas has 1 entries, but 2 were wanted."),
]  # fmt: skip
_SUM_REFUSALS: list[tuple[str, Any, str]] = [
    ("grad", torch.ones(2, 3, 4), "grad has shape (2, 3, 4), but (N, C, H, W) was wanted."),
    ("grad", _MAP.double(), "grad has dtype Double, but Float was wanted."),
    ("sums", [torch.ones(2, 3)] * 2, "sums[1] has shape (2, 3), but inputs[1] is not normalised and an empty tensor"),
    ("sums", [torch.ones(3, 3), torch.empty(0)], "sums[0] has shape (3, 3), but (2, 3) was wanted."),
    ("weight_gradient", torch.ones(1), "weight_gradient has shape (1), but (2) was wanted."),
    ("workspace", torch.empty(10000).double(), "workspace has dtype Double, but Float was wanted."),
]  # fmt: skip
REFUSALS |= {
    _fusion_forward: [*_NODE_REFUSALS, ("out", _MAP[..., 0], "out has shape (2, 3, 4), but (N, C, H, W) was wanted.")],
    _fusion_backward_sums: _NODE_REFUSALS + _SUM_REFUSALS,
    _fusion_backward: [
        *_NODE_REFUSALS,
        *_SUM_REFUSALS,
        ("positions", [0, 2], "positions[1] is 2, but a number from 0 to 1 was wanted."),
        ("positions", [0, 0], "positions holds 0 after 0, but rising numbers were wanted."),
        ("gradients", [_MAP], "gradients has 1 entries, but 2 were wanted."),
        ("gradients", [_MAP] * 2, "gradients[1] has shape (2, 3, 4, 4), but (2, 3, 7, 8) was wanted."),
    ],
}


def _operation(arguments: Callable[[], Arguments]) -> str:
    return "logits_forward" if arguments is _heads else arguments.__name__[1:]


@pytest.mark.parametrize("arguments", REFUSALS, ids=_operation)
def test_the_same_sentences_on_every_device(operators: Any, arguments: Callable[[], Arguments]) -> None:
    operator = getattr(operators, _operation(arguments)).default
    operator(*arguments().values())
    for name, value, sentence in REFUSALS[arguments]:
        with pytest.raises(RuntimeError) as caught:
            operator(*(arguments() | {name: value}).values())
        assert sentence in str(caught.value), (name, sentence)


@pytest.mark.skipif(emulation.problem() is not None, reason=str(emulation.problem()))
@pytest.mark.parametrize(
    ("arguments", "name", "value", "sentence"),
    [
        (_fusion_forward, "inputs", [_PIXEL.expand(2, 2**20, 2**10, 2)] * 2, "of at most 2^30 elements"),
        (_fusion_forward, "inputs", [_PIXEL.expand(2**31, 3, 4, 4)] * 2, "at most 2^30 samples"),
        (_fusion_backward, "workspace", None, "workspace has 0 elements"),
        (_fusion_backward, "workspace", torch.empty(1), "workspace has 1 elements"),
        (_fusion_backward_sums, "workspace", None, "workspace has 0 elements"),
        (_fusion_statistics, "workspace", torch.ones(5), "workspace has 5 elements"),
    ],
)
def test_limits_of_a_gpu(arguments: Callable[[], Arguments], name: str, value: Any, sentence: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(emulation.operators(), _operation(arguments)).default(*(arguments() | {name: value}).values())
    assert sentence in str(caught.value)
