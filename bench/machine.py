"""The machine that a result was made on: processor, versions, commit, allocator, and who else uses the cores."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# glibc gives a freed block of this size class back to the system and asks for fresh pages at the next call; a training
# process keeps them. One arena, no mmap, no trimming; no small-block caches, which split freed aligned blocks.
WARM_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}
MARKER = "FRSKD_FAST_BENCH_ALLOCATOR"


def warm_environment() -> dict[str, str]:
    """This process's environment, for one whose malloc keeps freed memory (it reads that only at its start)."""
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_ALLOCATOR["GLIBC_TUNABLES"])))
    return {**os.environ, **WARM_ALLOCATOR, "GLIBC_TUNABLES": tunables, MARKER: "warm"}


def forget_warm_environment() -> bool:
    """Whether this process was started with it. What it starts, the compiler of torch.compile, has no use for it."""
    warm = os.environ.get(MARKER) == "warm"
    for name in (*WARM_ALLOCATOR, MARKER) if warm else ():
        os.environ.pop(name, None)
    return warm


def allocator(cold: bool) -> dict[str, Any]:
    """How the host's memory is handed out in this process; restarts the process once to make it warm."""
    if forget_warm_environment():
        return {"mode": "warm: freed memory is kept", "settings": WARM_ALLOCATOR}
    if cold:
        return {"mode": "cold: malloc as it is", "settings": {}}
    if platform.libc_ver()[0] != "glibc":
        return {"mode": "cold: only glibc's malloc can be told to keep freed memory", "settings": {}}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], warm_environment())
    raise AssertionError("unreachable: the process was replaced")


def busy_cores(seconds: float = 0.2) -> float | None:
    """How many cores other processes use while this one sleeps; None where the system does not tell."""

    def ticks() -> tuple[int, int]:
        # "cpu" user nice system idle iowait irq softirq steal ..., summed over the cores
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        later_total, later_idle = ticks()
    except (OSError, ValueError, IndexError):
        return None
    elapsed = later_total - total
    return (elapsed - (later_idle - idle)) / elapsed * (os.cpu_count() or 1) if elapsed > 0 else None


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def commit(root: Path) -> str:
    """The commit checked out at `root`, marked where tracked files differ from it; empty where git does not tell."""

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(device: str, root: Path) -> dict[str, Any]:
    """What a result has to be read together with: machine and versions."""
    import torch

    import frskd_fast

    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"

    result: dict[str, Any] = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "frskd_fast": frskd_fast.__version__,
        "commit": commit(root) or "unknown",
    }
    if device == "cuda":
        result["cuda"] = torch.version.cuda or f"HIP {torch.version.hip}"
    return result
