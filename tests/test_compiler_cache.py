"""Graphs that Inductor keeps on the disk are not those of another version of this library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# An operation whose result is as long as `length` says: a fake that has it in its own file, and one that asks the raw
# functions, as the operation `logits` does.
OPERATION = """
import torch
from torch import Tensor

import raw
from frskd_fast import _dispatch
from frskd_fast.ops import _table

@_table.register("versioned")
def forward(values: Tensor, impl: str) -> Tensor:
    return values.new_empty(({length},))

_dispatch.provide("versioned", "cpu", raw)
print(torch.compile(lambda values: forward(values, "cpu") + 1.0)(torch.zeros(4)).tolist())
"""
RAW = """
LENGTH = {length}

def forward(values):
    return values.new_ones((LENGTH,))
"""


def run(folder: Path, length: int, in_fake: str) -> str:
    (folder / "operation.py").write_text(OPERATION.format(length=in_fake))
    (folder / "raw.py").write_text(RAW.format(length=length))
    # Bytecode is told apart by the second and the size of its source, which are the same here.
    more = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, folder / "operation.py"], env=os.environ | more, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("in_fake", ["{length}", '_dispatch.raw("versioned", impl).LENGTH'], ids=["fake", "raw"])
def test_an_older_version_leaves_no_graph_behind(tmp_path: Path, in_fake: str) -> None:
    assert run(tmp_path, 2, in_fake.format(length=2)) == "[2.0, 2.0]"
    assert run(tmp_path, 3, in_fake.format(length=3)) == "[2.0, 2.0, 2.0]"
