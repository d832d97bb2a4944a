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
# Every kernel takes one argument, a struct.
KERNELS = [name for source in sorted(SOURCES[0].parent.iterdir())
           for name in re.findall(r"(\w+)\(const __grid_constant__", source.read_text(encoding="utf-8"))]  # fmt: skip
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
def test_every_kernel_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    """And in the same variants."""
    names = {number: sorted(kernel.name for kernel in kernels if kernel.architecture == number)
             for number in ARCHITECTURES}  # fmt: skip
    assert names[ARCHITECTURES[0]]
    assert all(found == names[ARCHITECTURES[0]] for found in names.values())
    assert [name for name in KERNELS if not any(name in found for found in names[ARCHITECTURES[0]])] == []


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
