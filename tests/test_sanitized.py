"""Every C++ kernel path once, small: the part of the suite that CI repeats under AddressSanitizer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

import frskd_fast
from frskd_fast import functional

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_the_sanitised_library_is_the_one_loaded() -> None:
    if os.environ.get("FRSKD_FAST_SANITIZED") != "1":
        pytest.skip("not a sanitised run")
    library = Path(frskd_fast.__file__).parent / "_C.so"
    assert b"__asan_report_load" in library.read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_sizes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Whether batch or pixels are split, tails of vectors and tiles, every exponent."""
    sizes = [(1, 1, 1), (3, 2, 3), (5, 7, 7), (33, 4, 4), (37, 1, 9), (2, 33, 33)]
    for batch, exponent in itertools.product((1, 3), (1.0, 1.5, 2.0, 3.0, 4.0)):
        features = [torch.randn(batch, *size).to(dtype).to(memory_format=layout).requires_grad_() for size in sizes]
        others = [torch.randn(batch, *size).to(dtype) for size in sizes]
        functional.attention_transfer(features, others, exponent, impl="cpu").backward()
        functional.attention_map(features[2], exponent, impl="cpu").sum().backward()
        assert all(feature.grad is not None for feature in features)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_sizes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Rows and pixels, tails of vectors and tiles, every kind of target."""
    for shape in [(1, 1), (3, 7), (2, 9), (2, 1025), (2, 5, 3, 3), (1, 19, 12, 13), (2, 2100, 1, 9), (2, 3, 11)]:
        student, teacher = (torch.randn(shape).to(dtype) for _ in range(2))
        if len(shape) == 4:
            student = student.to(memory_format=layout)
        student.requires_grad_()
        labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        for targets in (None, labels, (labels, labels.flip(0), 0.5), torch.softmax(torch.randn(shape), 1)):
            parts = functional.cross_entropy_kd(
                student, teacher, targets, label_smoothing=0.1, detach_teacher=False, impl="cpu"
            )
            torch.autograd.grad(sum(parts), student)
