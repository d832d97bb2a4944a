"""Builds, proves and measures frskd_fast on a machine with a GPU: `python scripts/gpu_check.py [--quick]`.

Needs a CUDA build of PyTorch, pytest, a C++ compiler and nvcc; no network and no virtual environment. Everything it
writes goes to one folder ($OUT, else build/gpu-check): log.txt, summary.json and bench.json; the libraries go where a
build of this checkout puts them. A step that fails or runs out of time does not stop the following ones; the exit code
says whether all passed.

On a machine without a GPU, --dry-run compiles the CUDA sources where nvcc is found, collects the device tests, runs
the operations' problems on the CPU and prints the commands that only a GPU could run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TAIL = 30  # lines of a failed step shown on the screen


@dataclass
class Step:
    """One command with its own time limit, and what came of it."""

    name: str
    command: list[str]
    limit_s: int
    environment: dict[str, str] = field(default_factory=dict)
    dry: list[str] | None = None  # what --dry-run executes instead; None: nothing
    missing: str | None = None  # why it cannot run here
    state: str = "not run"  # passed, failed, timed out, skipped
    seconds: float = 0.0
    note: str = ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    return next((path for path in map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]) if path), None)


def find_sanitizer(nvcc: str | None) -> str | None:
    candidates = ["compute-sanitizer"]
    if nvcc is not None:
        home = Path(nvcc).resolve().parent.parent
        candidates += [str(home / "bin" / "compute-sanitizer"), str(home / "compute-sanitizer" / "compute-sanitizer")]
    candidates.append("/usr/local/cuda/bin/compute-sanitizer")
    return next((path for path in map(shutil.which, candidates) if path), None)


def environment_report() -> list[str]:
    """Facts about the machine, one a line."""
    lines = [f"python {platform.python_version()}, {platform.platform()}", f"processors {os.cpu_count()}"]
    try:
        import torch

        lines.append(f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(
                f"device {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
            )
    except ImportError as error:
        lines.append(f"torch does not import: {error}")
    queries = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
    }
    nvcc = find_nvcc()
    if nvcc is not None:
        queries["nvcc"] = [nvcc, "--version"]
    for name, command in queries.items():
        if shutil.which(command[0]) is None:
            lines.append(f"{name}: {command[0]} was not found")
            continue
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        text = [line for line in (done.stdout or done.stderr).splitlines() if name != "nvcc" or "release" in line]
        lines.append(f"{name}: {'; '.join(text)}")
    return lines


def has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def architecture_list() -> str:
    """The device's own architecture, so that the build takes seconds for one instead of minutes for all."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if not has_device():
        return "9.0"
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


def plan(out: Path, quick: bool) -> list[Step]:
    python = sys.executable
    this = str(Path(__file__).resolve())
    nvcc = find_nvcc()
    sanitizer = find_sanitizer(nvcc)
    build_environment = {
        "FRSKD_FAST_BUILD": "cuda",
        "FRSKD_FAST_WERROR": "1",
        "TORCH_CUDA_ARCH_LIST": architecture_list(),
    }
    build = [python, "setup.py", "--quiet", "build_ext"]
    no_nvcc = None if nvcc else "nvcc was not found: set CUDA_HOME or put it on PATH"
    no_sanitizer = None if sanitizer else "compute-sanitizer was not found: it comes with the CUDA toolkit"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    bench = [python, "bench/run.py", "--device", "cuda", "--json", str(out / "bench.json")]
    steps = [
        Step(
            "build", [*build, "--inplace"], 600, build_environment, missing=no_nvcc,
            dry=[*build, "--build-lib", str(out / "lib"), "--build-temp", str(out / "temp")],
        ),
        Step("ready", [python, this, "--ready"], 120),
        Step("device tests", [*tests, "-m", "gpu", "tests"], 1500, dry=[*tests, "-m", "gpu", "--collect-only", "tests"]),
    ]  # fmt: skip
    if not quick:
        steps.append(Step("other tests", [*tests, "-m", "not gpu"], 1500))
    # Every tensor in an allocation of its own, so that an access beside it is one beside an allocation.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer or "compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
        exercise = [python, this, "--exercise"]
        steps.append(
            Step(
                tool, [*command, *exercise, "cuda"], 600, separate, missing=no_sanitizer,
                dry=[*exercise, "cpu"] if tool == "memcheck" else None,
            )
        )  # fmt: skip
    steps.append(
        Step(
            "bench",
            [*bench, "--quick"] if quick else bench,
            600 if quick else 1800,
            dry=[python, "bench/run.py", "--help"],
        )
    )
    return steps


def run(step: Step, command: list[str], log: TextIO) -> None:
    """Run one step into the log; its process group ends with it, so that nothing is left on the device."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = " ".join(f"{name}={value}" for name, value in step.environment.items())
    log.write(f"\n=== {step.name}: {settings} {shlex.join(command)}\n")
    log.flush()
    start_of_output = log.tell()
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        step.state, step.note = "failed", str(error)
        return
    try:
        code = process.wait(step.limit_s)
        step.state = "passed" if code == 0 else "failed"
        step.note = "" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        step.state, step.note = "timed out", f"limit {step.limit_s} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    step.seconds = time.monotonic() - started
    log.flush()
    with open(log.name, encoding="utf-8", errors="replace") as written:
        written.seek(start_of_output)
        lines = written.read().splitlines()
    log.seek(0, os.SEEK_END)
    if step.state != "passed":
        print("\n".join(f"    {line}" for line in lines[-TAIL:]), flush=True)
    elif "pytest" in command and lines:
        step.note = lines[-1].strip("= ")


def execute(steps: list[Step], out: Path, dry: bool) -> bool:
    """Run the steps, print the summary and write it; True when all passed."""
    facts = environment_report()
    print("\n".join(facts), flush=True)
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        log.write("\n".join(facts) + "\n")
        for step in steps:
            command = step.dry if dry else step.command
            if step.missing is not None and not (dry and step.dry and step.name != "build"):
                # A missing compiler fails the check; a missing sanitizer only leaves its step out.
                step.state = "failed" if step.name == "build" and not dry else "skipped"
                step.note = step.missing
            elif command is None:
                step.state, step.note = "skipped", f"not part of a dry run: {shlex.join(step.command)}"
            else:
                print(f"--- {step.name}: {shlex.join(command)}", flush=True)
                run(step, command, log)
    print(f"\n{'step':<14} {'state':<10} {'seconds':>8}")
    for step in steps:
        print(f"{step.name:<14} {step.state:<10} {step.seconds:>8.1f}  {step.note}")
    passed = all(step.state in ("passed", "skipped") for step in steps)
    bench_file = out / "bench.json"
    summary = {
        "passed": passed,
        "dry_run": dry,
        "environment": facts,
        "steps": [asdict(step) for step in steps],
        "bench": str(bench_file) if bench_file.exists() else None,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{'everything passed' if passed else 'SOMETHING FAILED'}; details in {out}/log.txt and summary.json")
    return passed


def check_ready() -> None:
    """Exit with the reason unless the CUDA and Triton implementations can run here."""
    import torch

    from frskd_fast import _dispatch, env_report

    print(env_report.report())
    problems = {name: _dispatch.problem(name, "cuda", torch.float32) for name in ("cuda", "triton")}
    if not torch.cuda.is_available():
        problems["device"] = "PyTorch sees no CUDA device"
    if any(problems.values()):
        raise SystemExit("\n".join(f"{name}: {problem}" for name, problem in problems.items() if problem))


def exercise(device: str) -> None:
    """Every problem that an operation declares (tests/problems/<operation>.py): what the sanitizer watches."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import problems

    count = 0
    for operation, problem in problems.of_implementation(device):  # an implementation is called as its device is
        print(f"{operation}: {problem.name}", flush=True)
        problem.run(device, device)
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"exercised {count} problems" if count else "tests/problems declares no problem")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results (default: $OUT, else build/gpu-check)")
    parser.add_argument("--quick", action="store_true", help="device tests and a short benchmark only")
    parser.add_argument("--dry-run", action="store_true", help="what can be checked without a GPU")
    parser.add_argument("--steps", help="only these steps, comma-separated, e.g. build,ready,bench")
    parser.add_argument("--ready", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exercise", choices=("cpu", "cuda"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ready or arguments.exercise:
        sys.path.insert(0, str(ROOT))
        check_ready() if arguments.ready else exercise(arguments.exercise)
        return 0
    out = (arguments.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.dry_run and not has_device():
        parser.error("PyTorch sees no CUDA device; --dry-run checks what can be checked without one")
    steps = plan(out, arguments.quick)
    if arguments.steps:
        names = arguments.steps.split(",")
        unknown = set(names) - {step.name for step in steps}
        if unknown:
            known = ", ".join(step.name for step in steps)
            parser.error(f"--steps names {', '.join(sorted(unknown))}, but the steps are {known}")
        steps = [step for step in steps if step.name in names]
    return 0 if execute(steps, out, arguments.dry_run) else 1


if __name__ == "__main__":
    raise SystemExit(main())
