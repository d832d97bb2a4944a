"""Graphs that Inductor keeps on the disk are not those of another version of this library."""

import os
import subprocess
import sys
from pathlib import Path

OPERATION = """
import torch
from torch import Tensor
from frskd_fast import _dispatch
from frskd_fast.ops import _table

@_table.register("versioned")
def forward(values: Tensor, impl: str) -> Tensor:
    return values.new_empty(({size},))

class raw:
    forward = staticmethod(lambda values: values.new_ones(({size},)))

_dispatch.provide("versioned", "cpu", raw)
print(torch.compile(lambda values: forward(values, "cpu") + 1.0)(torch.zeros(4)).tolist())
"""


def run(folder: Path, size: int) -> str:
    program = folder / "operation.py"
    program.write_text(OPERATION.format(size=size))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_older_version_leaves_no_graph_behind(tmp_path: Path) -> None:
    assert run(tmp_path, 2) == "[2.0, 2.0]"
    assert run(tmp_path, 3) == "[2.0, 2.0, 2.0]"
