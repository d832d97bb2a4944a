"""The CUDA kernels on the CPU, as one more implementation: ``impl="emulation"``.

The sources of csrc/cuda are compiled by a plain C++ compiler and run thread by thread (cuda_emulation/). The raw
functions are those of `frskd_fast.native`, in copies that call the emulated library.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from frskd_fast import _dispatch, native

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_emulation"
NAME = "emulation"
OPERATIONS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def problem() -> str | None:
    """Why nothing can be emulated here, as a clause."""
    if shutil.which("g++") is None or sys.platform != "linux":
        return "the emulated kernels are compiled by g++ on Linux"
    return None


def asks_for_multiprocessors(operation: str) -> bool:
    """Whether an operation's plan depends on the device's number of multiprocessors."""
    return "multiprocessors()" in (ROOT / "csrc" / "cuda" / f"{operation}.cu").read_text(encoding="utf-8")


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{failure}:\n{done.stderr}"


def library(sources: Sequence[Path] = (), includes: Sequence[Path] = ()) -> Path:
    """The compiled library of csrc/cuda, or of other ``sources``, which is built where a source has changed."""
    sources = sorted([*(sources or (ROOT / "csrc" / "cuda").glob("*.cu")), *HERE.glob("*.cpp")])
    headers = [path for path in (ROOT / "csrc").rglob("*.[hc]*") if path.parent.name != "cpu"]
    headers += [path for folder in includes for path in folder.glob("*.h")]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted({*sources, *headers, *HERE.iterdir()}):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation" / digest.hexdigest()[:16]
    built = folder / "libemulated.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    # Each process builds in a folder of its own: two that find nothing built do not disturb each other.
    work = Path(tempfile.mkdtemp(dir=folder))
    torch_root = Path(torch.__file__).parent
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
    compiler += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DUSE_CUDA", "-DFRSKD_EMULATED"]
    compiler += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", "-isystem", str(torch_root / "include")]
    compiler += [f"-I{include}" for include in includes]
    objects = []
    for source in sources:
        objects.append(str(work / f"{source.name}.o"))
        _run([*compiler, "-x", "c++", "-c", str(source), "-o", objects[-1]], f"{source.name} does not compile")
    partial = work / "partial.so"
    # -Bsymbolic: the emulation's stand-ins for PyTorch's CUDA functions win over PyTorch's own.
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*link, "-o", str(partial)], "the emulated kernels do not link")
    partial.replace(built)
    shutil.rmtree(work)
    return built


@functools.cache
def operators() -> Any:
    """``torch.ops`` namespace of the emulated kernels."""
    torch.ops.load_library(str(library()))
    return torch.ops.frskd_fast_emulated


@functools.cache
def raw(operation: str) -> ModuleType:
    """The raw functions of an operation, which call the emulated kernels."""
    operators()
    return copy_of(f"{native.__name__}.{operation}")


def copy_of(module_name: str) -> ModuleType:
    """A module of raw functions, in a copy that calls emulated kernels and gives a workspace as on a device."""
    original = importlib.util.find_spec(module_name)
    assert original is not None and original.origin is not None
    spec = importlib.util.spec_from_file_location(f"emulated_{module_name.rpartition('.')[2]}", original.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(_ops=torch.ops.frskd_fast_emulated, needs_workspace=lambda tensor: True)
    return module


@contextmanager
def provided() -> Iterator[None]:
    """``impl="emulation"`` is known to every operation that has CUDA kernels."""
    for operation in OPERATIONS:
        _dispatch.provide(operation, NAME, raw(operation))
    with known():
        yield


@contextmanager
def known() -> Iterator[None]:
    """``impl="emulation"`` may be asked for."""
    names, original = _dispatch.IMPLEMENTATIONS, _dispatch.problem

    def problem_of(name: str, *call: Any) -> str | None:
        return None if name == NAME else original(name, *call)

    _dispatch.IMPLEMENTATIONS, _dispatch.problem = (*names, NAME), problem_of
    try:
        yield
    finally:
        _dispatch.IMPLEMENTATIONS, _dispatch.problem = names, original
