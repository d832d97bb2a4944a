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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import problems
import pytest
import torch

from frskd_fast import kernels

pytest.importorskip("triton", reason="Triton is not installed")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def _attention(layout: str, dtype: torch.dtype, exponent: float, batch: int = 2, device: str = "cpu") -> None:
    """A wide level, a deep one, and one of ImageNet's whose 196 pixels are no multiple of 16."""
    from frskd_fast.kernels import attention

    sizes = ((64, 32, 32), (512, 4, 4), (256, 14, 14)) if exponent == 2.0 and device == "cpu" else ((64, 32, 32),)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features = [torch.empty(batch, *size, dtype=dtype, device=device, memory_format=memory_format) for size in sizes]
    losses, coefficients, _ = attention.forward(features, features, exponent, True, True)
    assert coefficients is not None
    attention.backward(losses, 1.0, features, coefficients, exponent)


def _attention_map() -> None:
    from frskd_fast.kernels import attention

    attention.attention_map(torch.zeros(2, 64, 32, 32), 2.0)


def _logits(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    labels: str,
    temperature: float = 4.0,
    smoothing: float = 0.0,
    channels_last: bool = False,
    kd_to_teacher: bool = False,
    device: str = "cpu",
) -> None:
    from frskd_fast.kernels import logits

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    student = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    targets = {
        "none": [],
        "probabilities": [torch.empty(shape, dtype=accumulate, device=device)],
    }.get(labels, [torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device=device)])
    targets_b = targets if labels == "two" else []
    settings = (targets, targets_b, 0.3, smoothing, -100, temperature)
    losses, statistics, inverse_valid = logits.forward([student], [student], *settings)
    grads = [torch.empty((), dtype=losses.dtype, device=device).expand(losses.shape[1])] * 3
    scales = [float(labels != "none"), float(labels != "none"), 2.0]
    logits.backward(
        grads, 0, 1, scales, inverse_valid, [student], [student], *settings, statistics, losses, kd_to_teacher,
        True, True,
    )  # fmt: skip


def _combine(rows: int) -> None:
    from frskd_fast.kernels import combine

    for split in (False, True):
        combine.forward(torch.zeros(4, 128), torch.zeros(4, rows), 2.0, 100.0, True, split)


# Of the operations whose problems do not say what is to be compiled.
_CASES: dict[str, dict[str, Callable[[], None]]] = {
    "attention": {
        "nchw float32": lambda: _attention("nchw", torch.float32, 2.0),
        "nchw bfloat16": lambda: _attention("nchw", torch.bfloat16, 2.0),
        "channels_last float32": lambda: _attention("channels_last", torch.float32, 2.0),
        "channels_last bfloat16": lambda: _attention("channels_last", torch.bfloat16, 2.0),
        "p=2.3": lambda: _attention("nchw", torch.float32, 2.3),
        "float64": lambda: _attention("nchw", torch.float64, 2.0),
        "64-bit offsets": lambda: _attention("nchw", torch.float32, 2.0, batch=40_000, device="meta"),
        "map": _attention_map,
    },
    "logits": {
        "128x100 float32": lambda: _logits((128, 100), torch.float32, "indices"),
        "128x100 bfloat16, two labels": lambda: _logits((128, 100), torch.bfloat16, "two", smoothing=0.1),
        "128x100 T=10, probabilities": lambda: _logits((128, 100), torch.float32, "probabilities", 10.0, 0.1),
        "64x1000 to both sides": lambda: _logits((64, 1000), torch.float32, "indices", 10.0, kd_to_teacher=True),
        "16x4096, the largest single tile": lambda: _logits((16, 4096), torch.bfloat16, "none", 3.0),
        "16x50257, tiles": lambda: _logits((16, 50257), torch.bfloat16, "indices", 3.0, kd_to_teacher=True),
        "maps float32": lambda: _logits((2, 21, 65, 65), torch.float32, "indices", 1.0),
        "maps bfloat16": lambda: _logits((2, 150, 64, 64), torch.bfloat16, "indices", 3.0),
        "maps channels_last": lambda: _logits((2, 21, 65, 65), torch.float32, "indices", 4.0, channels_last=True),
        "maps float64": lambda: _logits((2, 21, 64, 64), torch.float64, "indices", 4.0),
        "maps, 64-bit offsets": lambda: _logits((16, 150, 1024, 1024), torch.bfloat16, "indices", device="meta"),
    },
    "combine": {
        "few rows": lambda: _combine(128),
        "many rows": lambda: _combine(200_000),
    },
}
OPERATIONS = sorted({operation for operation in problems.operations() if problems.compiled(operation)} | _CASES.keys())


def cases(operation: str) -> dict[str, Callable[[], None]]:
    """Launches of the kernels of an operation, with the block shapes of real calls."""
    found = problems.compiled(operation) if operation in problems.operations() else {}
    return found or _CASES[operation]


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
    for case, run in cases(operation).items():
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
    assert {report["case"] for report in reports} == set(cases(operation))
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
