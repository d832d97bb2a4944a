"""Measure frskd_fast next to eager PyTorch and torch.compile: `python bench/run.py [suite ...]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Last, so that an installed frskd_fast with its compiled libraries comes before the checkout.
    sys.path.append(str(ROOT))

from bench.cases import STEP, SUITES, cases_of  # noqa: E402

ALL_SUITES = (*SUITES, STEP)

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
CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("fp32", "bf16", "fp16"),
    "layout": ("nchw", "channels_last"),
    "impl": ("eager", "compile", "reference", "cpu", "triton", "cuda"),
}


def several(option: str) -> Any:
    """An argument type: names separated by commas, each one of CHOICES[option]."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        for name in names:
            if name not in CHOICES[option]:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(CHOICES[option])}")
        if not names:
            raise argparse.ArgumentTypeError(f"give at least one of {', '.join(CHOICES[option])}")
        return names

    return parse


def positive(kind: type) -> Any:
    """An argument type: a number of `kind` greater than 0."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return number

    parse.__name__ = kind.__name__
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = ", ".join(ALL_SUITES)
    result = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Time distillation losses, the self-teacher and whole training steps: eager PyTorch (the "
        "original's operations), torch.compile of the same function, and the implementations of frskd_fast. A result "
        "that is wrong gets no time.",
    )
    result.add_argument("suites", nargs="*", metavar="SUITE", help=f"which suites to run, of: {known} (default: all)")
    result.add_argument("--suite", nargs="+", default=[], metavar="NAME", help="the same as an option")
    result.add_argument("--quick", action="store_true", help="float32, NCHW, small cases only: a few minutes")
    result.add_argument(
        "--full",
        action="store_true",
        help="also what takes long on a CPU: float16 of every suite, bfloat16 networks, each node in each dtype, and a "
        "compiled training step in every setting",
    )
    result.add_argument("--device", choices=CHOICES["device"], help="default: cuda where torch sees a GPU, else cpu")
    result.add_argument(
        "--dtype", type=several("dtype"), help="comma-separated: fp32,bf16,fp16 (default: all; on a CPU no fp16)"
    )
    result.add_argument("--layout", type=several("layout"), help="comma-separated: nchw,channels_last (default: both)")
    result.add_argument(
        "--batch",
        type=positive(int),
        help="batch size N of every case (default: 128; logits: by shape; fusion, self_teacher, step: 32)",
    )
    result.add_argument(
        "--input",
        choices=("features", "random"),
        default="features",
        help="features: of an untrained cifarresnet18 with BiFPNc on scikit-learn's digits; random: no network",
    )
    result.add_argument(
        "--impl",
        type=several("impl"),
        help=f"comma-separated, of: {', '.join(CHOICES['impl'])} (default: eager, compile and those of the device)",
    )
    result.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    result.add_argument("--save", action="store_true", help="write them to bench/results/<date>-<device>.json")
    result.add_argument(
        "--plot",
        type=Path,
        metavar="PATH.png",
        help="write a bar plot; beside it, where the suite step runs, PATH-step.png: where a step's time goes (needs "
        "matplotlib)",
    )
    result.add_argument("--threads", type=positive(int), help="CPU threads (default: what torch takes)")
    result.add_argument(
        "--repeats", type=positive(int), help="runs of each implementation (default: by --target-seconds)"
    )
    result.add_argument(
        "--target-seconds", type=positive(float), help="timing per case, 3 to 200 runs (default: 1, with --quick 0.5)"
    )
    result.add_argument(
        "--cold-allocator", action="store_true", help="leave malloc as it is: every large result costs page faults"
    )
    result.add_argument(
        "--keep-compile-cache",
        action="store_true",
        help="let torch.compile use its cache on disk (default: a fresh one, so that compile seconds mean the same)",
    )
    return result


def restart_with_warm_allocator() -> None:
    """Replace this process by itself with glibc's malloc told to keep freed memory (read only at process start)."""
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_ALLOCATOR["GLIBC_TUNABLES"])))
    settings = {**WARM_ALLOCATOR, "GLIBC_TUNABLES": tunables, MARKER: "warm"}
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]], {**os.environ, **settings}
    )


def allocator(cold: bool) -> dict[str, Any]:
    """How the host's memory is handed out in this process; restarts the process once to make it warm."""
    if os.environ.get(MARKER) == "warm":
        # The compiler that torch.compile starts has no use for them.
        for name in (*WARM_ALLOCATOR, MARKER):
            os.environ.pop(name, None)
        return {"mode": "warm: freed memory is kept", "settings": WARM_ALLOCATOR}
    if cold:
        return {"mode": "cold: malloc as it is", "settings": {}}
    if platform.libc_ver()[0] != "glibc":
        return {"mode": "cold: only glibc's malloc can be told to keep freed memory", "settings": {}}
    restart_with_warm_allocator()
    raise AssertionError("unreachable: the process was replaced")


def slug(text: str) -> str:
    """Letters and digits of a device's name, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_dtypes(arguments: argparse.Namespace, device: str) -> tuple[str, ...]:
    """All; float32 alone for a quick run, no float16 on a CPU, which is slow at it, except in a full run."""
    if arguments.quick:
        return ("fp32",)
    return CHOICES["dtype"] if arguments.full or device == "cuda" else ("fp32", "bf16")


def measure_steps(
    arguments: argparse.Namespace, selection: Any, implementations: Sequence[str], target_seconds: float, clock: Any
) -> list[dict[str, Any]]:
    """Run the suite `step`."""
    from bench import harness, report
    from bench.cases import step

    forced = [name for name in implementations if name in harness.OURS]
    measurement = step.Measurement(
        selection.device,
        clock,
        # the only one of ours that was asked for
        impl=forced[0] if len(forced) == 1 else "auto",
        target_seconds=target_seconds,
        repeats=arguments.repeats,
        plot=arguments.plot is not None,
    )
    settings = step.settings(selection, implementations, dtypes_named=arguments.dtype is not None)
    batch = selection.batch or step.BATCH
    if not settings:
        return []  # nothing but float16 was asked for
    given = step.problem(batch)
    rows = []
    for number, setting in enumerate(settings, 1):
        print(f"[{number}/{len(settings)}] {setting.name(batch)} ... ", end="", flush=True)
        begin = time.perf_counter()
        found = step.run_setting(setting, given, measurement)
        rows += [dataclasses.asdict(row) for row in found]
        print(f"{', '.join(map(report.brief, found))}  ({time.perf_counter() - begin:.0f} s)", flush=True)
    return rows


def measure(
    arguments: argparse.Namespace, suites: list[str], device: str, host_allocator: dict[str, Any]
) -> dict[str, Any]:
    """Run the suites and return the document that --json writes."""
    import torch

    from bench import harness, inputs, report

    begin = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    selection = harness.Selection(
        device=device,
        dtypes=arguments.dtype or default_dtypes(arguments, device),
        layouts=arguments.layout or (("nchw",) if arguments.quick else CHOICES["layout"]),
        batch=arguments.batch,
        input_kind=arguments.input,
        quick=arguments.quick,
        full=arguments.full,
        named=bool(arguments.suites or arguments.suite),
    )
    settings = harness.Settings(
        device=device,
        implementations=arguments.impl or harness.DEFAULT_IMPLEMENTATIONS[device],
        target_seconds=arguments.target_seconds or (0.5 if arguments.quick else 1.0),
        repeats=arguments.repeats,
        host_time_of_compile=not arguments.quick,
    )
    cases = [case for suite in suites if suite in SUITES for case in cases_of(suite, selection)]
    document: dict[str, Any] = {
        "schema": report.SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "suites": suites,
        "command": ["bench/run.py", *sys.argv[1:]],
        "environment": harness.environment(device, ROOT),
        "allocator": host_allocator,
    }
    for line in report.header(document):
        print(line)
    if any("features" in name for case in cases for name in case.tiny()):
        print("Preparing the features ...", flush=True)
        document["inputs"] = inputs.distillation_inputs(2, selection.input_kind).source
        print(f"Inputs: {document['inputs']}.")
    if cases:
        print(f"{len(cases)} cases, each with {', '.join(settings.implementations)}:", flush=True)

    clock = harness.Clock(device)
    copy = harness.CopyMeter(device, clock)
    rows: list[dict[str, Any]] = []
    others: list[float | None] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name} ... ", end="", flush=True)
        case_begin = time.perf_counter()
        others.append(harness.busy_cores())
        case_rows = harness.run_case(case, settings, clock, copy)
        rows += [dataclasses.asdict(row) for row in case_rows]
        print(f"{', '.join(map(report.brief, case_rows))}  ({time.perf_counter() - case_begin:.0f} s)", flush=True)
    steps: list[dict[str, Any]] = []
    if STEP in suites:
        print("Whole training steps:", flush=True)
        others.append(harness.busy_cores())
        steps = measure_steps(arguments, selection, settings.implementations, settings.target_seconds, clock)
    document["copy_gigabytes_per_second"] = statistics.median(copy.samples) if copy.samples else None
    known = [busy for busy in others if busy is not None]
    document["others_busy_cores"] = statistics.median(known) if known else None
    document["seconds"] = time.perf_counter() - begin
    # A round trip, so that what is printed now and what is read from the file later cannot differ.
    document["rows"] = json.loads(json.dumps(report.jsonable(rows)))
    document["steps"] = json.loads(json.dumps(report.jsonable(steps)))
    return document


def main(argv: list[str] | None = None) -> int:
    """Run the suites asked for; 1 if an implementation of ours is wrong or fails."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    suites = list(dict.fromkeys([*arguments.suites, *arguments.suite])) or list(ALL_SUITES)
    for suite in suites:
        if suite not in ALL_SUITES:
            command_line.error(f"suite {suite!r} is not one of {', '.join(ALL_SUITES)}")
    if arguments.quick and arguments.full:
        command_line.error("--quick and --full exclude each other")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            command_line.error(f"the folder of {path} does not exist; create it or name another path")

    host_allocator = allocator(arguments.cold_allocator)
    with contextlib.ExitStack() as stack:
        if not arguments.keep_compile_cache and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_", ignore_cleanup_errors=True))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        # The profiler, which counts allocations, reports each start and stop otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch

        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            command_line.error("--device cuda was asked for, but torch sees no GPU; use --device cpu")
        document = measure(arguments, suites, device, host_allocator)

    from bench import report

    print()
    print(report.text(document))
    path = arguments.json
    if path is None and arguments.save:
        name = f"{document['date']}-{device}-{slug(document['environment']['device_name'])}.json"
        path = ROOT / "bench" / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {path}; `python bench/report.py {path} --markdown` makes tables of it.")
    if arguments.plot is not None:
        for written in report.plots(document, arguments.plot):
            print(f"Wrote {written}.")
    return 1 if report.failures(document) else 0


if __name__ == "__main__":
    sys.exit(main())
