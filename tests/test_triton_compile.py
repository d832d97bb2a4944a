"""Every Triton kernel compiles ahead of time for the supported GPUs, with production's block shapes, without spilling.

No GPU is needed: the raw functions run on CPU or meta tensors with the launch replaced by a recorder, and what they
would have launched is compiled for each target in a process of its own (this file, run as a program).
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import problems
import pytest
import torch

from frskd_fast import kernels

pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OPERATIONS = [operation for operation in problems.operations() if problems.compiled(operation)]


class Recorder:
    """Stands in for ``launch`` in every file of kernels and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for module in pkgutil.iter_modules(kernels.__path__):
            if not module.name.startswith("_"):
                vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))["launch"] = self

    def __call__(self, kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
        assert programs > 0
        self.calls.append((kernel, arguments, constants))


def _compile(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], name: str) -> Any:
    """What the just-in-time compiler would produce for this launch on the GPU ``name``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name.split("_")[1]), 32)
    if target.backend == "hip":
        constants = {name: value for name, value in constants.items() if name != "maxnreg"}
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*arguments, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _cuobjdump() -> str | None:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.is_file() else shutil.which("cuobjdump")


def _cuda_resources(cubin: bytes, cuobjdump: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    # STACK holds spilled registers as well as local arrays.
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]


def _amd_resources(assembly: str) -> dict[str, int]:
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names}  # type: ignore[index]


def _reports(target: str, operation: str) -> Iterator[dict[str, Any]]:
    cuobjdump = _cuobjdump()
    for case, run in problems.compiled(operation).items():
        recorder = Recorder()
        run()
        for kernel, arguments, constants in recorder.calls:
            compiled = _compile(kernel, arguments, constants, target)
            if target.startswith("gfx"):
                resources = _amd_resources(compiled.asm["amdgcn"])
            else:
                resources = _cuda_resources(compiled.asm["cubin"], cuobjdump) if cuobjdump else {}
            yield {"case": case, "kernel": kernel.__name__, "resources": resources}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_spills(operation: str, target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__, target, operation], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {report["case"] for report in reports} == set(problems.compiled(operation))
    if not reports[0]["resources"]:
        pytest.skip("compiled, but no cuobjdump was found to count spilled registers")
    spilling = [
        report
        for report in reports
        if any(size for name, size in report["resources"].items() if name not in ("reg", "vgpr_count"))
    ]
    assert not spilling, "\n".join(map(str, spilling))


if __name__ == "__main__":
    for line in _reports(*sys.argv[1:]):
        print(json.dumps(line), flush=True)
