"""Shared fixtures: fixed seeds, few threads, NaN-poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from problems._memory import poisoned_memory

# Files of a row that lies outside the package; test_toy_operation.py puts them where their imports find them.
collect_ignore = ["toy_operation"]

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the device tests where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fresh memory holds NaN, or from the C library huge numbers, so that an output a kernel forgets to write is caught."""
    with poisoned_memory():
        yield
