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


def test_the_sanitised_library_is_the_one_loaded_and_only_where_it_is_wanted() -> None:
    library = Path(frskd_fast.__file__).parent / "_C.so"
    content = library.read_bytes() if library.is_file() else b""
    assert (b"__asan_report_load" in content) == (os.environ.get("FRSKD_FAST_SANITIZED") == "1")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_sizes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Whether batch or pixels are split, tails of vectors and tiles, the square and any other power."""
    sizes = [(1, 1, 1), (3, 2, 3), (5, 7, 7), (33, 4, 4), (37, 1, 9), (35, 17, 16), (2, 33, 33)]
    for batch, exponent in itertools.product((1, 3), (1.5, 2.0)):
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_moment_sizes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Tails of vectors and of groups of channels, sums in several parts, own moments computed and given."""
    for shape in [(1, 1, 1, 2), (2, 9, 3, 3), (3, 17, 5, 7), (1, 515, 2, 3), (1, 3, 67, 65)]:
        style, content = (torch.randn(shape).to(dtype).to(memory_format=layout) for _ in range(2))
        for learns in (False, True):
            style.requires_grad_()
            moments = functional.channel_moments(style, impl="cpu")
            out = functional.adain(content.requires_grad_(learns), *moments, impl="cpu")
            assert torch.autograd.grad(out.sum(), style)[0].shape == shape


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fusion_sizes(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Tails of vectors, blocks of channels, groups of samples, windows and copies at every edge, flat and long planes."""
    nodes = [
        (1, 1, ["none"], [(1, 1)], (1, 1)),
        (2, 9, ["none", "up", "pool", "up"], [(6, 9), (2, 3), (12, 17), (1, 2)], (6, 9)),
        (33, 7, ["pool", "pool"], [(1, 2), (2, 1)], (1, 1)),
        (1, 1100, ["none", "up", "pool"], [(2, 3), (1, 2), (3, 5)], (2, 3)),
        (1, 2, ["none", "none"], [(37, 31), (37, 31)], (37, 31)),
        (1, 3, ["up", "pool"], [(2, 150), (5, 599)], (3, 300)),
        (1, 1, ["none"], [(257, 256)], (257, 256)),
    ]
    for (batch, channels, resample, sizes, size), kind in itertools.product(nodes, ("plain", "normalised", "slices")):
        made = [torch.randn(batch, channels + 3, *one).to(dtype).to(memory_format=layout) for one in sizes]
        maps = [x[:, 2 : 2 + channels] if kind == "slices" else x[:, :channels].clone() for x in made]
        leaves = [x.detach().requires_grad_() for x in maps]
        weight = torch.rand(len(maps), requires_grad=True)
        norms = None
        if kind == "normalised":
            norms = [None if batch * x[0, 0].numel() == 1 else torch.nn.BatchNorm2d(channels) for x in maps]
        for pre in ("relu", "silu"):
            out = functional.weighted_fusion(
                leaves, weight, resample=resample, size=size, pre=pre, batch_norms=norms, impl="cpu"
            )
            expanded = torch.ones((), dtype=dtype).expand(out.shape)
            for grad in (torch.randn(out.shape).to(dtype), expanded):
                gradients = torch.autograd.grad(out, [*leaves, weight], grad, retain_graph=True)
                assert all(gradient.isfinite().all() for gradient in gradients)
            torch.autograd.grad(out, weight, expanded)
