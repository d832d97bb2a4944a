"""The CUDA sources compile without a warning for every architecture of a release, and no kernel spills registers.

The compiler's resource report is read; nothing is run, so neither a GPU nor a CUDA build of PyTorch is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

SOURCES = sorted((Path(__file__).resolve().parent.parent / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
# Kernels of one architecture: those over four dtypes and two kinds of exponent (or with and without an activation), over four
# dtypes, over two accumulate types.
KERNELS = {
    "attention_fused": 8,
    "attention_tiles": 8,
    "attention_gradient": 8,
    "attention_finish": 2,
    "attention_normalise": 2,
    "logits_losses": 4,
    "logits_gradients": 4,
    "count_partial_labels": 2,
    "sum_partial_counts": 2,
    "fusion_fuse": 4,
    "fusion_gather": 8,
    "fusion_measure": 4,
    "fusion_add_partials": 2,
    "fusion_merge_statistics": 2,
    "combine_parts": 1,
}
DYNAMIC_SHARED = ("attention_fused",)  # whose launch counts on less than 1 KB of static shared memory


class Kernel(NamedTuple):
    """One entry of the assembler's resource report."""

    name: str
    architecture: str
    stack_bytes: int
    spilled_bytes: int
    registers: int
    shared_bytes: int


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def _compile(source: Path, folder: Path, nvcc: str) -> str:
    """Compile one file for all architectures; the assembler's report."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem={include}"]
    flags += [f"-isystem={sysconfig.get_path('include')}", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]
    flags += ["-Werror=all-warnings", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = [nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stdout}{done.stderr}"
    return done.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc: set CUDA_HOME or put it on PATH")
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        report = "".join(pool.map(lambda source: _compile(source, folder, nvcc), SOURCES))
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = []
    for name, architecture, stack, stores, loads, registers, rest in pattern.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Kernel(
                name,
                architecture,
                int(stack),
                int(stores) + int(loads),
                int(registers),
                int(shared[1]) if shared else 0,
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there(kernels: list[Kernel], architecture: str) -> None:
    names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
    counts = {wanted: sum(wanted in name for name in names) for wanted in KERNELS}
    assert counts == KERNELS
    assert len(names) == sum(KERNELS.values())


@pytest.mark.slow
def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.spilled_bytes > 0] == []


@pytest.mark.slow
def test_no_kernel_keeps_an_array_in_local_memory(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.stack_bytes > 0] == []


@pytest.mark.slow
def test_static_shared_memory_leaves_room(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        limit = 1024 if any(name in kernel.name for name in DYNAMIC_SHARED) else 48 * 1024
        assert kernel.shared_bytes < limit, kernel
